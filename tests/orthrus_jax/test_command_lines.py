"""Command lines of the library as processes: bad ones end in one line with status 2, and kills
and broken streams in no traceback.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import pytest

from orthrus_jax.checkpoint import save_checkpoint
from orthrus_jax.model import Model, params
from tests.support.commands import CommandLine, check_refused, run, run_until_killed
from tests.support.configs import text_config
from tests.support.paths import ROOT
from tests.support.tokenizers import small_tokenizer

pytestmark = pytest.mark.slow

GENERATE = "orthrus_jax.generate --model {model} --prompt Hi"
CHAT = "orthrus_jax.chat --model {model}"
CONVERT = "orthrus_jax.convert --from {model} --to out"
AOT = "orthrus_jax.aot --preset qwen3-0.6b --topology v5e:1x1 --program prefill"
SERVE = "orthrus_jax.serve --model {model} --port 0"
WEIGHTS = "model.safetensors"
BOM = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A tiny random checkpoint, damaged copies of it, prompt files and other paths."""
    root = tmp_path_factory.mktemp("places")
    config = text_config()
    weights = params.init(Model(config), jax.random.key(0))
    tokenizer = small_tokenizer(["How many apples are 12 and 30?", "42."] * 9, 400)
    save_checkpoint(root / "model", config, weights, tokenizer=tokenizer)
    for name, damage in DAMAGES.items():
        shutil.copytree(root / "model", root / name)
        damage(root / name)
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    (root / "empty").mkdir()
    (root / "full").mkdir()
    (root / "full" / "mine.txt").write_text("not a checkpoint")
    return {path.name.split(".")[0]: path for path in root.iterdir()}


def setting(**values: Any) -> Callable[[pathlib.Path], None]:
    """Change config.json."""

    def damage(directory: pathlib.Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def content(name: str, text: bytes | None) -> Callable[[pathlib.Path], None]:
    """Replace a file's content; None removes the file."""

    def damage(directory: pathlib.Path) -> None:
        (directory / name).unlink(missing_ok=True)
        if text is not None:
            (directory / name).write_bytes(text)

    return damage


DAMAGES = {
    "wideblock": setting(block_size=9999),
    "textsize": setting(vocab_size="many"),
    "nolayers": setting(num_hidden_layers=0),
    "layers": setting(num_hidden_layers=10**9),
    "textends": setting(eos_token_id="none"),
    "nestedrope": setting(rope_parameters=[1]),
    "noeps": setting(rms_norm_eps=0),
    "otherfamily": setting(model_type="gpt2"),
    "vocabulary": setting(vocab_size=300, mask_token_id=None),
    "deep": content("config.json", b"[" * 100_000),
    "digits": content("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"),
    "noconfig": content("config.json", None),
    "notjson": content("config.json", b"\xff\xfe"),
    "noweights": content(WEIGHTS, None),
    "cutweights": content(WEIGHTS, b"\x10\0\0\0\0\0\0\0{}"),
    "notokenizer": content("tokenizer.json", None),
    "badtokenizer": content("tokenizer.json", b"{}"),
    "template": content("chat_template.jinja", b"{% for m in messages %}"),
    "raising": content("chat_template.jinja", b"{{ raise_exception('never') }}"),
    "measured": content("calibration.json", b'{"cost": {"cpu": {"1": []}}}'),
    "lengths": content("calibration.json", b'{"draft_length": {"cpu": 3}}'),
}
FILES = {
    "prompts.jsonl": b'{"prompt": "Hi"}\n',
    "nothing.jsonl": b"\n\n",
    "words.jsonl": b"Hi\n",
    "number.jsonl": b'{"prompt": "Hi"}\n{"prompt": 5}\n',
    "missing.jsonl": b'{"text": "Hi"}\n',
    "void.jsonl": b'{"prompt": ""}\n',
    "latin.jsonl": b'{"prompt": "\xe9"}\n',
    "marked.jsonl": BOM + b'{"prompt": "Hi"}\n',
    "surrogate.jsonl": b'{"prompt": "\\ud800"}\n',
    "packed.jsonl.gz": b"not gzip",
    "file.txt": b"a file\n",
}


def generating(flags: str, says: str, **fields: Any) -> CommandLine:
    return CommandLine(f"{GENERATE} {flags}", says, **fields)


def loading(name: str, says: str, command: str = GENERATE) -> CommandLine:
    return CommandLine(command.replace("{model}", f"{{{name}}}"), says)


def reading(name: str, says: str) -> CommandLine:
    return CommandLine(
        f"orthrus_jax.generate --model {{model}} --prompts {{{name}}} --max-new-tokens 2", says
    )


LINES = [
    # numbers
    generating("--max-new-tokens 0", "error: max_new_tokens=0 must be at least 1"),
    generating("--max-new-tokens 9999", "over the model's 256 positions"),
    generating("--max-new-tokens 2.5", "argument --max-new-tokens: invalid int value: '2.5'"),
    generating("--min-new-tokens 9 --max-new-tokens 3", "min_new_tokens=9 must be from 0 to"),
    generating("--min-new-tokens 300", "min_new_tokens=300 must be from 0 to max_new_tokens=256"),
    generating("--temperature -1", "temperature=-1.0 must be 0 or more"),
    generating("--temperature nan", "temperature=nan must be 0 or more"),
    generating("--temperature inf", "temperature=inf must be 0 or more"),
    generating("--temperature 1e-20", "is too small"),
    generating("--top-k -1", "top_k=-1 must be 0 (off) or more"),
    generating("--top-k 99999999999999999999", "top_k=99999999999999999999 must be 0 (off)"),
    generating("--top-p 2", "top_p=2.0 must be above 0"),
    generating("--min-p 1", "min_p=1.0 must be from 0"),
    generating("--seed -1", "seed=-1 must be from 0 to 4294967295"),
    generating("--seed 1e3", "argument --seed: invalid int value: '1e3'"),
    generating("--n 0", "n=0 must be at least 1"),
    generating("--n 2", "n=2 with temperature=0"),
    generating("--n 4 --temperature 1 --batch-size 2", "n=4 is over batch_size=2"),
    generating("--batch-size 0", "batch_size=0 must be at least 1"),
    generating("--batch-size 999999999", "GB are free: lower the batch size"),
    generating("--stop=", "stop=('',) must be a sequence of strings, none empty"),
    generating("--stop-token-id 400", "are not below the vocabulary's 400"),
    generating("--stop-token-id -5", "stop_token_ids=(-5,) must be ids of 0 or more"),
    # strategies
    generating("--draft-length 1", "draft_length=1 must be from 2 to 5"),
    generating("--draft-length 6", "draft_length=6 must be from 2 to 5"),
    generating("--tree-nodes 15", "--tree-nodes 15 needs --cycle two-forward or one-forward"),
    generating("--cycle two-forward --tree-nodes 100000", "tree_nodes=100000 must be below the"),
    generating("--cycle one-forward --early-blocks -1", "early_blocks=-1 must be 0 or more"),
    generating("--cycle one-forward --early-blocks 0", "drafts by at least one"),
    generating("--cycle paper --fresh-blocks 1", "--fresh-blocks 1 needs --cycle one-forward"),
    generating("--cycle sideways", "argument --cycle: invalid choice: 'sideways'"),
    generating("--mode ar --cycle paper", "--cycle paper: decoding one token per forward (ar)"),
    generating("--mode ar --tree-nodes 15", "--tree-nodes 15: decoding one token per forward"),
    generating("--rows 0", "rows=0 must be at least 1"),
    generating("--rows 16 --draft-length 4", "--draft-length 4 beside --rows 16"),
    generating("--rows 16 --cycle two-forward", "--cycle two-forward beside --rows 16"),
    generating("--rows 16 --mode ar", "--rows 16: decoding one token per forward"),
    # flags
    generating("--stream --json", "--stream goes with neither --json nor --n"),
    generating("--logprobs", "--logprobs needs --json"),
    generating("--prompts x", "not allowed with argument --prompt"),
    generating("--dtype int8", "argument --dtype: invalid choice: 'int8'"),
    generating("--mesh 4", "--mesh '4': expected something like data=2,tensor=4"),
    generating("--mesh data=64", "does not fit 1 devices"),
    generating("--fast", "unrecognized arguments: --fast"),
    CommandLine("orthrus_jax.generate --model {model}", "one of the arguments --prompt --prompts"),
    CommandLine("orthrus_jax.generate --prompt Hi", "arguments are required: --model"),
    # texts
    CommandLine(GENERATE.replace("Hi", "-"), "the prompt is empty"),
    CommandLine(GENERATE.replace("Hi", "-"), "standard input is not UTF-8", stdin=b"a\xff"),
    reading("nothing", "holds no prompt"),
    reading("words", ":1 is not a JSON object"),
    reading("number", ':2: "prompt" is 5: expected a text'),
    reading("missing", ':1 is not a JSON object with a "prompt"'),
    reading("void", ':1: "prompt" is "": expected a text'),
    reading("latin", ":1 is not a JSON object"),
    reading("marked", ":1 begins with a byte order mark"),
    reading("surrogate", "the lone surrogate '\\ud800'"),
    reading("packed", "cannot be read"),
    reading("empty", "cannot be read: Is a directory"),
    CommandLine("orthrus_jax.generate --model x --prompts /no/such", "/no/such cannot be read"),
    # models
    CommandLine("orthrus_jax.generate --model /no/such --prompt Hi", "/no/such cannot be loaded"),
    CommandLine("orthrus_jax.generate --model= --prompt Hi", "the source is empty"),
    loading("empty", "config.json does not exist"),
    loading("file", "cannot be loaded (no such directory)"),
    loading("noconfig", "config.json does not exist"),
    loading("notjson", "config.json cannot be read as JSON"),
    loading("deep", "config.json cannot be read as JSON"),
    loading("digits", "config.json cannot be read as JSON"),
    loading("wideblock", "block_size=9999 is over max_position_embeddings=256"),
    loading("textsize", "vocab_size='many'"),
    loading("nolayers", "num_hidden_layers=0: expected a whole number from 1"),
    loading("layers", "num_hidden_layers=1000000000 is over 1024"),
    loading("textends", "eos_token_id='none': expected a token id"),
    loading("nestedrope", "rope_parameters=[1]"),
    loading("noeps", "rms_norm_eps=0: expected a positive finite number"),
    loading("otherfamily", "model_type='gpt2'"),
    loading("vocabulary", "the tensors do not fit"),
    loading("noweights", f"holds no {WEIGHTS}"),
    loading("cutweights", "is not a readable safetensors file"),
    loading("notokenizer", "has no tokenizer.json"),
    loading("badtokenizer", "cannot be loaded"),
    loading("template", "the tokenizer's chat template cannot be applied"),
    loading("raising", "chat template cannot be applied (never)"),
    loading("measured", "calibration.json is damaged"),
    loading("lengths", "calibration.json is damaged"),
    # platforms and places
    generating("", "JAX_PLATFORMS=bogus finds no device", environment={"JAX_PLATFORMS": "bogus"}),
    generating("", "JAX_PLATFORMS=cuda finds no device", environment={"JAX_PLATFORMS": "cuda"}),
    generating("", "JAX_DISABLE_JIT is set", environment={"JAX_DISABLE_JIT": "1"}),
    generating("--compile-cache {file}", "cannot be written (File exists): give a directory"),
    generating("--compile-cache /proc/x", "--compile-cache '/proc/x' cannot be written"),
    # chat
    CommandLine(f"{CHAT} --temperature -1", "temperature=-1.0 must be 0 or more", stdin=b"Hi\n"),
    CommandLine(f"{CHAT} --rows 0", "rows=0 must be at least 1", stdin=b"Hi\n"),
    CommandLine(f"{CHAT} --n 2", "unrecognized arguments: --n 2"),
    CommandLine(f"{CHAT} --draft-length 9", "draft_length=9 must be from 2 to 5", stdin=b"Hi\n"),
    loading("noweights", f"holds no {WEIGHTS}", CHAT),
    # convert
    CommandLine("orthrus_jax.convert --from {model} --to {full}", "is not empty: name another"),
    CommandLine("orthrus_jax.convert --from {model} --to {file}", "is a file: expected a direct"),
    CommandLine(
        "orthrus_jax.convert --from {model} --to {full} --overwrite",
        "holds no checkpoint (no config.json): not overwritten",
    ),
    CommandLine("orthrus_jax.convert --from {model} --to {file}/x", "Not a directory"),
    CommandLine("orthrus_jax.convert --from {model} --to /proc/x", "could not be written"),
    CommandLine("orthrus_jax.convert --from {model}", "arguments are required: --to"),
    CommandLine(f"{CONVERT} --dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
    loading("cutweights", "is not a readable safetensors file", CONVERT),
    loading("textends", "eos_token_id='none'", CONVERT),
    CommandLine(CONVERT, "JAX_PLATFORMS=no finds no device", environment={"JAX_PLATFORMS": "no"}),
    # serve
    CommandLine("orthrus_jax.serve --port 0", "arguments are required: --model"),
    CommandLine(f"{SERVE} --max-batch 0", "--max-batch 0: expected at least 1"),
    CommandLine(f"{SERVE} --max-batch 999999999", "GB are free"),
    CommandLine(f"{SERVE} --max-context 257", "--max-context 257"),
    CommandLine(f"{SERVE} --drain-timeout inf", "--drain-timeout inf: expected seconds above 0"),
    CommandLine(f"{SERVE} --request-timeout nan", "--request-timeout nan: expected seconds above"),
    CommandLine(f"{SERVE} --mode ar --tree-nodes 4", "--tree-nodes 4: decoding one token per fo"),
    CommandLine(f"{SERVE} --host 256.0.0.1", "--host 256.0.0.1"),
    CommandLine(f"{SERVE}x", "argument --port: invalid int value: '0x'"),
    loading("noweights", f"holds no {WEIGHTS}", SERVE),
    loading("notokenizer", "has no tokenizer.json", SERVE),
    CommandLine(SERVE, "JAX_PLATFORMS=no finds no device", environment={"JAX_PLATFORMS": "no"}),
    # aot, and the command of commands
    CommandLine(AOT.replace("qwen3-0.6b", "qwen9"), "argument --preset: invalid choice: 'qwen9'"),
    CommandLine(AOT.replace("prefill", "nothing"), "argument --program: invalid choice"),
    CommandLine(f"{AOT} --batch two", "argument --batch: invalid int value: 'two'"),
    CommandLine("orthrus_jax.aot --preset qwen3-0.6b", "arguments are required: --topology"),
    CommandLine("orthrus_jax", "arguments are required: COMMAND"),
    CommandLine("orthrus_jax fly", "invalid choice: 'fly'"),
    CommandLine("orthrus_jax generate --model {empty} --prompt Hi", "config.json does not exist"),
    CommandLine("orthrus_jax convert --from {empty} --to out", "config.json does not exist"),
    CommandLine("orthrus_jax --verbose", "COMMAND"),
]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_bad_command_line_is_refused_in_one_line(line, places, tmp_path) -> None:
    check_refused(line, tmp_path, places)


def test_there_are_enough_command_lines() -> None:
    assert len(LINES) >= 120


def started(arguments: str, places: dict[str, pathlib.Path], **options: Any) -> subprocess.Popen:
    command = [sys.executable, "-m", *arguments.format(**places).split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("environment", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(command, text=True, env=environment, **pipes)


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err
    return process.returncode, out or "", err


def test_full_disk_under_the_output_is_named(places) -> None:
    with open("/dev/full", "w") as full:
        process = started(f"{GENERATE} --max-new-tokens 2", places, stdout=full)
        status, _, err = ended(process)
    assert (status, err.splitlines()[-1]) == (2, "error: the output: No space left on device")


@pytest.mark.parametrize("flags", ["", "--stream", "--json"])
def test_reader_that_goes_ends_the_command_quietly(places, flags: str) -> None:
    process = started(f"{GENERATE} --max-new-tokens 2 {flags}", places)
    process.stdout.close()
    assert process.wait(timeout=600) == 141
    lines = process.stderr.read().splitlines()
    assert all(line.startswith("note: ") for line in lines), lines


@pytest.mark.parametrize("arguments", [GENERATE.replace("Hi", "-"), CHAT])
def test_closed_standard_input_is_named(places, arguments: str) -> None:
    close = "import os, sys; os.close(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", close, "-m", *arguments.format(**places).split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: standard input is closed")


def test_deleted_working_directory_is_named(places, tmp_path) -> None:
    (tmp_path / "gone").mkdir()
    leave = (
        "import os, sys; os.rmdir(os.getcwd()); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    command = [sys.executable, "-c", leave, "-m", *GENERATE.format(**places).split()]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=600, cwd=tmp_path / "gone"
    )
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: the working directory was deleted")


def test_chat_goes_on_after_a_line_that_is_not_utf_8(places, tmp_path) -> None:
    arguments = f"{CHAT} --max-new-tokens 3".format(**places).split()
    process = run(arguments, tmp_path, b"a\xff\n<|im_end|>\n/exit\n")
    assert process.returncode == 0
    assert "lone surrogate" in process.stderr
    assert process.stderr.count("tokens per forward") == 1
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("arguments", [GENERATE, "orthrus_jax generate --model {model} --prompt x"])
@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0, 4.0])
def test_ctrl_c_at_any_moment_is_one_line(places, arguments: str, seconds: float) -> None:
    process = started(f"{arguments} --max-new-tokens 200", places, stdin=subprocess.PIPE)
    time.sleep(seconds)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    status, _, err = ended(process)
    if status:  # else it had ended
        assert status in (130, -signal.SIGINT)
        assert err.splitlines()[-1:] in ([], ["interrupted"]), err


@pytest.mark.parametrize("seconds", [1.0, 3.0, 6.0])
def test_sigterm_is_one_line_and_leaves_nothing(places, tmp_path, seconds: float) -> None:
    command = f"orthrus_jax.convert --from {{model}} --to {tmp_path}/out"
    process = started(command, places)
    time.sleep(seconds)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    status, _, err = ended(process)
    assert status in (0, 143, -signal.SIGTERM)
    if status == 143:
        assert err.splitlines()[-1] == "terminated"
    assert {path.name for path in tmp_path.iterdir()} <= ({"out"} if status == 0 else set())


def state(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_killed_convert_ends_with_the_same_bytes_when_repeated(places, tmp_path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = ["orthrus_jax.convert", "--from", str(places["model"]), "--dtype", "bfloat16"]
    begin = time.monotonic()
    assert run([*command, "--to", str(whole)], tmp_path).returncode == 0
    seconds = time.monotonic() - begin
    moments = random.Random(0)
    for _ in range(5):
        for _ in range(4):  # 20 kills in all; most of a conversion is imports, and they come first
            overwrite = ["--overwrite"] if killed.exists() else []
            begun = [*command, "--to", str(killed), *overwrite]
            run_until_killed(begun, moments.uniform(0.3, 1.0) * seconds, tmp_path)
        overwrite = ["--overwrite"] if killed.exists() else []
        again = run([*command, "--to", str(killed), *overwrite], tmp_path)
        assert again.returncode == 0, again.stderr
        assert state(killed) == state(whole)
        assert {path.name for path in tmp_path.iterdir()} == {"whole", "killed"}
        shutil.rmtree(killed)


def test_two_converts_into_one_directory_leave_one_whole(places, tmp_path) -> None:
    command = f"orthrus_jax.convert --from {{model}} --to {tmp_path}/out"
    endings = [ended(process) for process in [started(command, places) for _ in range(2)]]
    assert sorted(status for status, *_ in endings) == [0, 2]
    for status, _, err in endings:
        if status:
            assert "is not empty" in err or "could not be written" in err
    assert run(["orthrus_jax.generate", "--model", str(tmp_path / "out"), "--prompt", "x",
                "--max-new-tokens", "2"], tmp_path).returncode == 0  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
