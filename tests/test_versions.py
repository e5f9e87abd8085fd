"""The README's table of tested versions is what CI installs and the package allows."""

import fnmatch
import re
import tomllib

from tests.support.paths import ROOT

PACKAGES = ("jax", "flax")


def table() -> dict[str, dict[str, str]]:
    """README's rows by set: the versions of python, jax and flax."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (oldest|default|newest) \| (\S+) \| (\S+) \| (\S+) \|", text, re.M)
    return {row[0]: dict(zip(("python", *PACKAGES), row[1:], strict=True)) for row in rows}


def ends() -> dict[str, dict[str, str]]:
    """What .ci/ends installs, as patterns."""
    lines = re.findall(r"^end (\w+) (\S+) (.+)$", (ROOT / ".ci" / "ends").read_text(), re.M)
    pins = lambda words: dict(word.strip("'").split("==") for word in words.split())
    ours = lambda words: {name: pin for name, pin in pins(words).items() if name in PACKAGES}
    return {name: {"python": python} | ours(words) for name, python, words in lines}


def bounds() -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """pyproject.toml's first version and the first beyond, by package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounded = (re.match(r"([\w-]+)>=([\d.]+),<([\d.]+)$", x) for x in project["dependencies"])
    return {m[1]: (number(m[2]), number(m[3])) for m in bounded if m}


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def test_the_table_names_the_versions_of_both_ends() -> None:
    assert set(table()) == {"default", *ends()}
    for name, patterns in ends().items():
        for package, pattern in patterns.items():
            assert fnmatch.fnmatch(table()[name][package], pattern), (name, package)


def test_the_table_reaches_the_bounds_of_the_package() -> None:
    for package in PACKAGES:
        first, beyond = bounds()[package]
        versions = [number(table()[name][package]) for name in ("oldest", "default", "newest")]
        assert versions == sorted(versions)
        assert versions[0] == first
        assert beyond == (versions[-1][0], versions[-1][1] + 1), "what was not tested is allowed"
    oldest = re.search(r'requires-python = ">=(\d+\.\d+)', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert table()["oldest"]["python"] == oldest[1]
