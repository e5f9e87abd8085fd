"""A run's recipe: what it remembers of its configuration, and how far it has come.

recipe.json belongs to the checkpoints: it is written when training begins, after everything else
was accepted. train.json is written last: a run that has it is finished. Knows no weights.
"""

import enum
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line, write_atomic
from orthrus_jax.values import shown

RECIPE, FINISHED = "recipe.json", "train.json"
STEPS = "train.steps"
# Values and parts that may differ when a run goes on: they set where it runs and what it reports,
# not what it computes; `model` and `pretrain` describe the base, which has a checksum.
MAY_CHANGE = (
    *("run", "mesh", "distributed", "model", "pretrain", "distill.batch_size", "distill.tensor"),
    *("train.accumulate", "train.remat", "train.log_every", "train.eval_every"),
    *("train.save_every", "train.keep", "train.eval_prompts", "train.eval_sources"),
    "head",  # trained anew from blocks that it compares itself
)


class Progress(enum.Enum):
    """How far a run has come with its recipe."""

    NEW = "nothing is trained"
    BEGUN = "trained, but not to the end"
    FINISHED = "trained to the end and exported"


def progress(run: pathlib.Path, config: Any, *, change: bool) -> Progress:
    """Compare a configuration with the recipe of a run.

    A finished run whose `train.steps` is raised is BEGUN: it is extended.

    Args:
      run: its directory.
      config: of this command line.
      change: accept any recipe for what is trained already.

    Raises:
      UserError: when the recipe differs in a value that matters, or cannot be read.
    """
    finished, saved = (run / FINISHED).exists(), _saved_steps(run)
    if not saved and not finished:
        return Progress.NEW
    anew = "or --overwrite to start anew"
    if not saved and change:
        raise UserError(f"{run} is finished and has no checkpoint to go on from: give {anew[3:]}")
    go_on = "--change_recipe to go on with the new recipe, " if saved else ""
    for name, before, now in () if change else _changed(run / RECIPE, config):
        if name == STEPS and _is_extended(saved, before, now):
            return Progress.BEGUN
        raise UserError(
            f"{run} was begun with {name}={shown(before)}, now {shown(now)}: give another "
            f"--config.run, {go_on}{anew}"
        )
    done = finished and not change and (run / "model" / "config.json").exists()
    return Progress.FINISHED if done else Progress.BEGUN


def _saved_steps(run: pathlib.Path) -> list[int]:
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [int(name) for name in names if name.isdecimal()]


def _is_extended(saved: list[int], before: Any, now: Any) -> bool:
    """Whether a run that was trained to its last step gets more of them."""
    whole = isinstance(before, int) and isinstance(now, int)
    return whole and max(saved, default=0) >= before and now > before


def write(run: pathlib.Path, config: Any) -> None:
    """Remember the recipe with which a run goes on; from now on it is not finished."""
    (run / FINISHED).unlink(missing_ok=True)
    text = json.dumps(_values_of(config), indent=2, sort_keys=True) + "\n"
    write_atomic(run / RECIPE, text)


def read(path: pathlib.Path) -> dict[str, Any]:
    """Read recipe.json: values by their dotted names.

    Raises:
      UserError: when it is missing or damaged.
    """
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise _damaged(path, first_line(error)) from None
    if not isinstance(recipe, dict):
        raise _damaged(path, f"it holds a {type(recipe).__name__}")
    return recipe


def _damaged(path: pathlib.Path, why: str) -> UserError:
    return UserError(
        f"{path}, the recipe of the checkpoints beside it, cannot be read ({why:.80}): give "
        "--change_recipe to go on with this recipe, or --overwrite to start anew"
    )


def _changed(path: pathlib.Path, config: Any) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each difference that matters; `train.steps` comes last."""
    before, now = read(path), _values_of(config)
    for name in sorted(before.keys() | now.keys(), key=lambda name: (name == STEPS, name)):
        free = any(name == part or name.startswith(f"{part}.") for part in MAY_CHANGE)
        if not free and before.get(name) != now.get(name):
            yield name, before.get(name), now.get(name)


def _values_of(config: Any) -> dict[str, Any]:
    """The values of a configuration in JSON, by their dotted names."""
    return _flat(json.loads(config.to_json_best_effort()))


def _flat(tree: dict[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{at}{name}.") if isinstance(value, dict) else {at + name: value}
    return flat
