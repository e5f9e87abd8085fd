"""A run's files, recipe.json and answers.jsonl: their form, read and checked.

Decides which files are damaged. Knows no figures, and neither models nor benchmarks.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from orthrus_jax.decoding import CYCLES, AcceptRule
from orthrus_jax.decoding.strategy import SPENT_BY
from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line

RECIPE, ANSWERS = "recipe.json", "answers.jsonl"
LOOPS = ("ar", "orthrus")  # in the order they take turns
MOST = 10**9  # of any count, and of any number of seconds
DEEPEST = 1024  # of drafts accepted in a cycle
Row = Mapping[str, Any]
Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    """Whether it is a text that can be written: without half a surrogate pair."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST


def _is_amount(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= MOST


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


ANY: Check = lambda value: True
FIELDS_OF_RECIPE: Mapping[str, Check] = {
    **dict.fromkeys(("title", "model", "hardware"), _is_text),
    **dict.fromkeys(("trained", "graded"), _is_flag),
    "problems": _is_count,
}
FIELDS_ASKED: Mapping[str, Check] = {
    "mode": _one_of("both", *LOOPS),
    "accept": _one_of(*(rule.value for rule in AcceptRule)),
    "thinking": _is_flag,
    **dict.fromkeys(("temperature", "top_p"), _is_amount),
    **dict.fromkeys(("batch_size", "n", "max_new_tokens"), lambda x: _is_count(x) and x > 0),
    **dict.fromkeys(("top_k", "seed"), _is_whole),
    "data": ANY,
}
FIELDS_LOADED: Mapping[str, Check] = {
    "draft_length": lambda value: _is_whole(value) and 2 <= value <= DEEPEST,
    "dtype": _is_text,
}
FIELDS_OF_ROW: Mapping[str, Check] = {
    "id": _is_text,
    "groups": lambda value: (
        isinstance(value, dict) and all(map(_is_text, (*value, *value.values())))
    ),
    "seconds": lambda value: isinstance(value, dict) and all(map(_is_amount, value.values())),
    "answers": lambda value: (
        isinstance(value, list) and all(isinstance(answer, dict) for answer in value)
    ),
}
FIELDS_OF_ANSWER: Mapping[str, Check] = {
    "loop": _one_of(*LOOPS),
    **dict.fromkeys(("sample", "turn"), _is_count),
}
FIELDS_DECODED: Mapping[str, Check] = {
    **dict.fromkeys(("tokens", "forwards"), _is_count),
    **dict.fromkeys(("seconds", "first_seconds"), _is_amount),
    **dict.fromkeys(("digest", "finish_reason"), _is_text),
    "accepted": lambda value: (
        isinstance(value, list) and all(_is_whole(n) and n <= DEEPEST for n in value)
    ),
}


def _check(values: Any, fields: Mapping[str, Check]) -> None:
    """Raise ValueError that names the first field that is missing or not as it must be."""
    if not isinstance(values, dict):
        raise ValueError("expected a JSON object")
    for name, is_right in fields.items():
        if name not in values:
            raise ValueError(f'there is no "{name}"')
        if not is_right(values[name]):
            raise ValueError(f'"{name}" is {values[name]!r:.60}')


def _check_recipe(recipe: Any) -> None:
    _check(recipe, FIELDS_OF_RECIPE)
    _check(recipe.get("asked"), FIELDS_ASKED)
    loaded = recipe.get("loaded")
    _check(loaded, FIELDS_LOADED)
    if loaded.get("cycle", "paper") != "paper":
        counts = {name: lambda x: x is None or _is_count(x) for name in SPENT_BY}
        _check(loaded, {"cycle": _one_of(*CYCLES), **counts})


def _check_row(row: Any, recipe: Row) -> None:
    """Raise ValueError for a problem's line that figures cannot be made of."""
    _check(row, FIELDS_OF_ROW)
    settings = recipe["asked"]
    mode, samples = settings["mode"], settings["n"]
    _check(row["seconds"], {loop: ANY for loop in LOOPS if mode in (loop, "both")})
    places = set()
    for answer in row["answers"]:
        _check(answer, FIELDS_OF_ANSWER)
        if not _is_text(answer.get("note", "")):
            raise ValueError('"note" is no text')
        places.add((answer["loop"], answer["sample"], answer["turn"]))
        if answer["sample"] >= samples:
            raise ValueError(f"sample {answer['sample']} of {samples}")
        if "skipped" in answer:
            continue
        _check(answer, FIELDS_DECODED)
    if len(places) < len(row["answers"]):
        raise ValueError("an answer comes twice")
    for loop in LOOPS:
        right = [a for a in row["answers"] if a["loop"] == loop and a.get("correct")]
        if len(right) > samples:
            raise ValueError(f"{len(right)} right answers of {samples}")


def read_answers(path: pathlib.Path, recipe: Row) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of answers.jsonl, and their size in bytes.

    The torn end that a killed run may leave after them is left out.

    Raises:
      UserError: for a damaged line that is not the last, or a problem that comes twice.
    """
    try:
        *lines, torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    if torn:
        lines.append(torn)
    rows: dict[str, dict[str, Any]] = {}
    size = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            _check_row(row, recipe)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number} is damaged ({first_line(error)}): delete the line, then --resume"
            ) from None
        if number == len(lines) and torn:  # whole, but for its newline
            break
        key = row["id"]
        if key in rows:
            raise UserError(f"{path}:{number} answers {key} once more: delete one of the lines")
        if rows and row["groups"].keys() != next(iter(rows.values()))["groups"].keys():
            raise UserError(
                f"{path}:{number} has other groups than the lines before: another run's"
            )
        rows[key] = row
        size += len(line) + 1
    return list(rows.values()), size


def read_recipe(directory: pathlib.Path) -> dict[str, Any]:
    """The recipe of a run.

    Raises:
      UserError: naming a directory that holds no run, or what is damaged.
    """
    path = directory / RECIPE
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        _check_recipe(recipe)
    except OSError:
        raise UserError(
            f"{directory} holds no run: expected the --out directory of an eval command, with "
            f"{RECIPE} and {ANSWERS} in it"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({first_line(error)}): {directory} holds no run that can be read"
        ) from None
    return recipe


def read_run(directory: str | pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The recipe and the answered problems of a run, at least one.

    Raises:
      UserError: naming the directory or the file, and what is wrong with it.
    """
    directory = pathlib.Path(directory)
    recipe = read_recipe(directory)
    rows, _ = read_answers(directory / ANSWERS, recipe)
    if not rows:
        raise UserError(f"{directory} holds no answer yet: go on with its command and --resume")
    return recipe, rows
