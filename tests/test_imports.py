"""Who imports whom: one way, without circles; and no file grows too long to read."""

import ast
from collections.abc import Mapping

import pytest

from tests.support.paths import ROOT

PACKAGES = ("orthrus_jax", "train", "eval")
LONGEST = 450  # lines
# Modules and packages of the library from the ground up: each imports only from before itself.
ORDER = (
    *("errors", "values", "files", "metrics", "config", "sharding", "tokenizer", "runtime"),
    *("attention", "model", "memory", "checkpoint", "decoding", "drafters", "engine", "llm"),
    *("cli", "conversation", "server", "generate", "chat", "serve", "replicas", "convert", "aot"),
    *("__init__", "__main__"),
)
# ... less these: files and decoding meet in llm alone.
APART = {(room, "checkpoint") for room in ("decoding", "drafters", "engine")}
MAY_IMPORT = {"orthrus_jax": (), "train": ("orthrus_jax",), "eval": ("orthrus_jax", "train")}


def sources() -> dict[str, str]:
    """The text of every module; a package's own is NAME.__init__."""
    paths = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in paths}


def imports(modules: Mapping[str, str]) -> dict[str, set[str]]:
    """The project's modules that each imports: at its top, late, or for type checkers only."""

    def resolve(package: str, name: str = "") -> str | None:
        names = (f"{package}.{name}", f"{package}.{name}.__init__", package, f"{package}.__init__")
        return next((candidate for candidate in names if candidate in modules), None)

    graph = {}
    for module, text in modules.items():
        targets: set[str | None] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}: relative imports are not read here"
                targets |= {resolve(node.module or "", alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                targets |= {resolve(alias.name) for alias in node.names}
        graph[module] = {target for target in targets if target is not None}
    return graph


def out_of_order(graph: Mapping[str, set[str]]) -> list[str]:
    """The imports that go up, or that a rule forbids."""
    edges = [(module, target) for module in graph for target in graph[module]]
    return [f"{module} imports {target}" for module, target in edges if not allowed(module, target)]


def allowed(module: str, target: str) -> bool:
    (package, room), (other, other_room) = module.split(".")[:2], target.split(".")[:2]
    if other != package:
        return other in MAY_IMPORT[package]
    if package != "orthrus_jax" or room == other_room:
        return True
    assert {room, other_room} <= set(ORDER), f"{module} or {target} has no place in ORDER"
    return ORDER.index(other_room) < ORDER.index(room) and (room, other_room) not in APART


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules left when those that import none of the rest, or are not imported, are taken."""
    rest = dict(graph)
    while rest:
        imported = set().union(*rest.values())
        kept = {m: t & rest.keys() for m, t in rest.items() if t & rest.keys() and m in imported}
        if len(kept) == len(rest):
            break
        rest = kept
    return sorted(rest)


def test_imports_go_one_way() -> None:
    graph = imports(sources())
    assert len(graph) > 60
    assert sum(map(len, graph.values())) > 200
    assert not out_of_order(graph)


def test_no_modules_import_each_other() -> None:
    assert not circle(imports(sources()))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_too_long(package: str) -> None:
    lengths = {name: text.count("\n") for name, text in sources().items()}
    assert not {name: n for name, n in lengths.items() if n > LONGEST and name.startswith(package)}


LIBRARY = {
    "orthrus_jax.errors": "",
    "orthrus_jax.config": "from orthrus_jax.errors import UserError",
    "orthrus_jax.model.__init__": "from orthrus_jax.model.layers import Layer",
    "orthrus_jax.model.layers": "from orthrus_jax import config",
    "orthrus_jax.checkpoint.__init__": "from orthrus_jax.model import Layer",
    "orthrus_jax.engine.__init__": "import json",
    "train.data": "import orthrus_jax.engine",
    "eval.report": "import train.data\nfrom orthrus_jax import model",
}


def test_imports_are_read() -> None:
    graph = imports(LIBRARY)
    assert graph["orthrus_jax.model.layers"] == {"orthrus_jax.config"}
    assert graph["orthrus_jax.checkpoint.__init__"] == {"orthrus_jax.model.__init__"}
    assert graph["eval.report"] == {"train.data", "orthrus_jax.model.__init__"}
    assert not out_of_order(graph)
    assert not circle(graph)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("orthrus_jax.errors", "from orthrus_jax.config import ModelConfig"),
        ("orthrus_jax.config", "def late():\n    from orthrus_jax import model"),
        ("orthrus_jax.model.layers", "if TYPE_CHECKING:\n    import orthrus_jax.engine"),
        ("orthrus_jax.engine.__init__", "from orthrus_jax.checkpoint import load_checkpoint"),
        ("orthrus_jax.engine.__init__", "import train.data"),
        ("train.data", "from eval import report"),
    ],
)
def test_an_import_up_is_seen(module: str, text: str) -> None:
    assert len(out_of_order(imports(LIBRARY | {module: text}))) == 1


def test_a_circle_is_seen() -> None:
    loop = {"orthrus_jax.model.layers": "from orthrus_jax.model import Layer"}
    graph = imports(LIBRARY | loop)
    assert not out_of_order(graph)
    assert circle(graph) == ["orthrus_jax.model.__init__", "orthrus_jax.model.layers"]
