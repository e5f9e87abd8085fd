"""What is installed and what is public: the console command, extras, the wheel, marks of tests."""

import contextlib
import fnmatch
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import types
import venv
from importlib import metadata

import pytest

import orthrus_jax
from orthrus_jax import __main__, errors
from tests.support.paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = tuple(__main__.COMMANDS)
PUBLIC = ["Auto", "Completion", "Conversation", "KVCacheConfig", "LLM", "SamplingParams",
          "Strategy", "__version__", "load", "save_view"]  # fmt: skip
NO_JAX = """
import sys
sys.modules["jax"] = None  # importing it fails
from orthrus_jax.__main__ import main
main(sys.argv[1:])
"""
WITHOUT = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "{missing}" else find(name, *rest)
sys.argv = ["-m", "--help"]
runpy.run_module("{module}", run_name="__main__")
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_public_names_are_listed_and_there() -> None:
    assert dir(orthrus_jax) == PUBLIC
    assert sorted(orthrus_jax.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(orthrus_jax, name)
    with pytest.raises(AttributeError, match="no attribute 'Generator'"):
        orthrus_jax.Generator  # noqa: B018


def test_extras_of_other_packages_are_theirs() -> None:
    """pip installs a package without an extra that it lacks, and only warns."""
    lines = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    named = [match for line in lines if (match := re.match(r"([\w-]+)\[([\w,-]+)\]", line))]
    others = [match for match in named if match[1] != PROJECT["name"]]
    assert "math-verify" in {match[1] for match in others}
    for match in others:
        with contextlib.suppress(metadata.PackageNotFoundError):
            known = metadata.metadata(match[1]).get_all("Provides-Extra") or []
            assert set(match[2].split(",")) <= set(known), match[0]


def test_version_is_said_once() -> None:
    assert "version" in PROJECT["dynamic"]
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited is not None
    assert cited[1] == orthrus_jax.__version__


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_command_does_not_import_jax_to_speak_of_itself(flag: str) -> None:
    run = python("-c", NO_JAX, flag)
    assert (run.returncode, run.stderr) == (0, "")
    if flag == "--version":
        assert run.stdout == f"orthrus_jax {orthrus_jax.__version__}\n"
    else:
        lines = run.stdout.splitlines()
        for name, summary in __main__.COMMANDS.items():
            assert any(line.split(maxsplit=1) == [name, summary] for line in lines), name


@pytest.mark.parametrize("arguments", [[], ["translate"]])
def test_command_refuses_in_one_line(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        __main__.main(arguments)
    assert end.value.code == 2
    assert "COMMAND" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_modules_own_under_the_name_it_was_called(name: str, monkeypatch, capsys):
    spellings = {
        f"/usr/bin/orthrus {name}": f"orthrus {name}",
        f"/lib/orthrus_jax/__main__.py {name}": f"python -m orthrus_jax {name}",
        f"/lib/orthrus_jax/{name}.py": f"python -m orthrus_jax.{name}",
    }
    texts = set()
    module = importlib.import_module(f"orthrus_jax.{name}")
    for spelling, program in spellings.items():
        monkeypatch.setattr(sys, "argv", [*spelling.split(), "--help"])
        with pytest.raises(SystemExit, match="0"):
            (module if spelling.endswith(".py") else __main__).main()
        text = capsys.readouterr().out
        assert text.startswith(f"usage: {program} [-h]")
        texts.add(" ".join(text.replace(program, "PROGRAM", 1).split()))
    assert len(texts) == 1


@pytest.mark.parametrize(("extra", "module"), [("train", "train.main"), ("eval", "eval.math500")])
def test_command_without_its_extra_names_it(extra: str, module: str) -> None:
    missing = errors.EXTRAS[extra][-1]
    run = python("-c", WITHOUT.format(missing=missing, module=module))
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == (
        f"error: {missing} not installed: pip install -e '.[{extra}]' in the checkout\n"
    )


def test_extras_are_those_of_pyproject() -> None:
    modules = {"math-verify": "math_verify", "ml-collections": "ml_collections"}
    modules |= {"orbax-checkpoint": "orbax", "prometheus-client": "prometheus_client"}
    for extra, names in errors.EXTRAS.items():
        distributions = [re.split(r"[\[<>=]", line)[0] for line in
                         PROJECT["optional-dependencies"][extra]]  # fmt: skip
        assert sorted(names) == sorted(modules.get(name, name) for name in distributions)


def test_marks_name_files_that_are_there(pytestconfig: pytest.Config) -> None:
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    assert isinstance(conftest, types.ModuleType)
    paths = [p.relative_to(ROOT / "tests").as_posix() for p in (ROOT / "tests").rglob("test_*.py")]
    for mark, beginnings in conftest.MARKS.items():
        for beginning in beginnings:
            assert fnmatch.filter(paths, f"{beginning}*"), (mark, beginning)


FILES = "import importlib.metadata as m; print(*m.files('orthrus-jax'), sep='\\n')"
ANSWER = """
import orthrus_jax
print(orthrus_jax.load("model").generate(["What is 2+2?"], max_new_tokens=8)[0].text)
"""


@pytest.mark.slow
def test_the_library_alone_answers_in_an_empty_environment(tiny_base, tmp_path) -> None:
    """As a person has it who installs it and has no checkout."""
    source, binaries = tmp_path / "source", tmp_path / "venv" / "bin"
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if name.startswith(("orthrus_jax/", "train/", "eval/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)  # building leaves files beside it
    environment = {**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"}

    def run(command: str, *arguments: object) -> str:
        process = subprocess.run(
            [binaries / command, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    venv.create(tmp_path / "venv", with_pip=True)
    run("python", "-m", "pip", "--quiet", "install", source)
    files = run("python", "-c", FILES).splitlines()
    assert "orthrus_jax/py.typed" in files
    folders = {name.split("/")[0] for name in files if not name.startswith("..")}  # .. is bin/
    assert folders == {"orthrus_jax", f"orthrus_jax-{orthrus_jax.__version__}.dist-info"}

    assert run("orthrus", "--version") == f"orthrus_jax {orthrus_jax.__version__}\n"
    run("orthrus", "convert", "--from", tiny_base, "--to", "model")
    prompt = ("--model", "model", "--prompt", "What is 2+2?", "--max-new-tokens", 8, "--json")
    answer = json.loads(run("orthrus", "generate", *prompt))
    assert answer["tokens"] == 8
    assert run("python", "-c", ANSWER) == f"{answer['text']}\n"
