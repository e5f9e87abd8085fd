"""The values of a configuration: which there are, and which are refused before any work.

One table for all commands; what holds between several values is checked below it. Knows no files
and no devices; distill.py checks its own part, ModelConfig the sizes of `model`.
"""

import math
from typing import Any

from ml_collections import ConfigDict

from orthrus_jax.config import DTYPES, INT32
from orthrus_jax.errors import UserError
from orthrus_jax.model import REMAT
from orthrus_jax.model.pairwise import KINDS
from orthrus_jax.values import check_number, check_switch, check_type, check_whole, shown
from train.divergence import Divergence

UINT32 = 2**32 - 1
COUNT = (1, INT32)
WHOLE: dict[str, tuple[int, int]] = {  # the least and the most
    "seed": (0, UINT32 - 3),  # the stages add up to 3
    "mesh.data": (-1, INT32),
    "mesh.fsdp": (-1, INT32),
    "mesh.tensor": (-1, INT32),
    "train.seed": (0, UINT32),
    "train.block_size": (2, INT32),
    "train.row_length": (3, INT32),
    "train.anchors": COUNT,
    "train.batch_size": COUNT,
    "train.accumulate": COUNT,
    "train.steps": (2, INT32),  # the learning rate of the first is 0
    "train.log_every": COUNT,
    "train.eval_every": COUNT,
    "train.save_every": COUNT,
    "train.keep": COUNT,
    "train.eval_prompts": (0, INT32),
    "head.steps": (0, INT32),
    "head.rank": COUNT,
    "head.blocks": COUNT,
    "head.batch_size": COUNT,
    "pretrain.steps": (2, INT32),
    "pretrain.batch_size": COUNT,
    "pretrain.row_length": (2, INT32),
    "pretrain.significant_bits": (0, 24),
}
SHARE, POSITIVE, WEIGHT = "from 0 to below 1", "above 0 and finite", "0 or more and finite"
REAL = {
    "train.learning_rate": POSITIVE,
    "train.warmup": SHARE,
    "train.gamma": WEIGHT,
    "head.learning_rate": POSITIVE,
    "head.gamma": POSITIVE,
    "pretrain.learning_rate": POSITIVE,
    "pretrain.warmup": SHARE,
    "pretrain.question_weight": WEIGHT,
}
SWITCHES = ("distributed", "train.document_masks", "train.train_o_proj", "train.stack_layers")
TEXTS = ("run", "base", "responses", "pretrain.data")
MAY_BE_EMPTY = ("responses", "pretrain.data")
CHOICES = {
    "train.dtype": DTYPES,
    "train.divergence": tuple(divergence.value for divergence in Divergence),
    "train.remat": tuple(REMAT),
    "head.kind": KINDS,
}
OTHERS = ("train.eval_sources",)  # checked where they are read


def check(config: Any, *parts: str) -> None:
    """Refuse a value that is missing, unknown, of a wrong type or out of its range.

    Args:
      config: of the command line.
      parts: what the command reads: "train", "mesh", "pretrain", or a value such as "base".

    Raises:
      UserError: naming the value as the command line does, and what was expected.
    """
    tables = (WHOLE, REAL, SWITCHES, TEXTS, CHOICES, OTHERS)
    known = [name for table in tables for name in table]
    for part in parts:
        own = [name for name in known if name == part or name.startswith(f"{part}.")]
        _check_names(config, part, own)
        for name in own:
            _check_value(f"config.{name}", name, _value(config, name))
    for part in {"train", "pretrain"} & set(parts):
        _check_schedule(part, config[part])
    if "train" in parts:
        _check_blocks(config.train)


def _check_names(config: Any, part: str, known: list[str]) -> None:
    if known == [part]:
        if part not in config:
            raise UserError(f"the configuration has no {part}: see configs/paper.py")
        return
    group(config, part)
    names = {name.partition(".")[2] for name in known}
    if missing := sorted(names - set(config[part])):
        raise UserError(f"the configuration's {part} lacks {', '.join(missing)}")
    if unknown := sorted(set(map(str, config[part])) - names):
        raise UserError(
            f"the configuration's {part} has no {', '.join(unknown)}; known: "
            f"{', '.join(sorted(names))}"
        )


def group(config: Any, part: str) -> ConfigDict:
    """A part of a configuration that has values of its own.

    Raises:
      UserError: when it is missing or something else.
    """
    if part not in config:
        raise UserError(f"the configuration has no {part}: see configs/paper.py")
    check_type(f"config.{part}", config[part], ConfigDict, "a ConfigDict")
    return config[part]


def _value(config: Any, name: str) -> Any:
    part, _, key = name.partition(".")
    return config[part][key] if key else config[part]


def _check_value(flag: str, name: str, value: Any) -> None:
    if name in WHOLE:
        check_whole(flag, value, *WHOLE[name])
    elif name in REAL:
        check_number(flag, value)
        holds = {
            POSITIVE: 0 < value < math.inf,
            SHARE: 0 <= value < 1,
            WEIGHT: 0 <= value < math.inf,
        }
        if not holds[REAL[name]]:
            raise UserError(f"{flag}={value!r} must be {REAL[name]}")
    elif name in SWITCHES:
        check_switch(flag, value)
    elif name in TEXTS:
        check_type(flag, value, str, "a text")
        if not value and name not in MAY_BE_EMPTY:
            raise UserError(f"{flag} is empty: give --{flag}=PATH")
        try:
            valid = b"\0" not in value.encode()
        except UnicodeEncodeError:
            valid = False
        if not valid:
            raise UserError(f"{flag}={shown(value)} is no name that a file can have")
    elif name in CHOICES and value not in CHOICES[name]:
        raise UserError(f"{flag}={shown(value)} is not one of {', '.join(CHOICES[name])}")


def _check_schedule(part: str, t: Any) -> None:
    """Refuse a warm-up that leaves no step in which the learning rate falls."""
    if max(1, round(t.steps * t.warmup)) >= t.steps:
        raise UserError(
            f"config.{part}.warmup={t.warmup} of config.{part}.steps={t.steps} leaves no step "
            "after the warm-up: give more steps or a smaller warm-up"
        )


def _check_blocks(t: Any) -> None:
    """Refuse blocks and anchors that a row has no room for."""
    if t.block_size >= t.row_length:
        raise UserError(
            f"config.train.block_size={t.block_size} must be below config.train.row_length="
            f"{t.row_length}: a block lies within a row"
        )
    room = t.row_length - t.block_size
    if t.anchors > room:
        raise UserError(
            f"config.train.anchors={t.anchors} must be at most {room}: so many blocks of "
            f"{t.block_size} can begin in a row of {t.row_length}"
        )


def sources(pairs: Any, flag: str) -> tuple[tuple[str, float], ...]:
    """The pairs (source, weight) of a mix.

    Raises:
      UserError: for anything else.
    """
    kinds = (tuple, list)
    valid = isinstance(pairs, kinds) and all(
        isinstance(pair, kinds) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    )
    if not pairs or not valid:
        raise UserError(f"{flag}={shown(pairs)} must be pairs (source, weight)")
    for name, weight in pairs:
        check_number(f"the weight of {name!r} in {flag}", weight)
    return tuple((name, weight) for name, weight in pairs)
