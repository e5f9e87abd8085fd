"""The README's tree of files: every module of the library, each once."""

import re

from tests.support.paths import ROOT


def listed() -> list[str]:
    """The files below orthrus_jax/ that the tree names, also those in brackets, in its order."""
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("    orthrus_jax/ ") : text.index("    train/  ")]
    files, folder = [], ""
    for line in tree.split("\n")[1:]:
        if found := re.match(r" {6}(\w+/)", line):
            folder = found[1]
        elif line.startswith("      "):
            folder = folder if line.startswith(" " * 8) else ""
            files += [folder + name for name in re.findall(r"\b\w+\.(?:py|html)\b", line)]
    return files


def present() -> list[str]:
    """All files but faces, and those of aot/, which the tree leaves out."""
    library = ROOT / "orthrus_jax"
    files = [*library.rglob("*.py"), *library.rglob("*.html")]
    names = [path.relative_to(library).as_posix() for path in files if path.name != "__init__.py"]
    return [name for name in names if not name.startswith("aot/")]


def test_every_module_of_the_library_is_in_the_tree_once() -> None:
    assert sorted(listed()) == sorted(present())
