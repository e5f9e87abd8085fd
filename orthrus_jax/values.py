"""Checks of the values that a caller gives, each refused by name in one line.

Decides how a value of a wrong type is shown and what counts as a whole number. Knows no meanings:
the limits are the callers'.
"""

import numbers
from typing import Any

from orthrus_jax.errors import UserError

SHOWN = 60  # characters of a refused value


def shown(value: Any) -> str:
    """A value as a message has it: on one line, its beginning only."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as an integer of over 4,300 digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def is_whole(value: Any) -> bool:
    """Whether `value` is an integer of Python or numpy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> None:
    """Refuse what is no whole number from `least` to `most`; None is no limit.

    Raises:
      UserError: naming the argument, its value and its limit.
    """
    if not is_whole(value):
        raise UserError(f"{name}={shown(value)} must be a whole number")
    if least is not None and value < least:
        limit = f"at least {least}" if least else "0 or more"
        raise UserError(f"{name}={shown(value)} must be {limit}")
    if most is not None and value > most:
        raise UserError(f"{name}={shown(value)} must be at most {most}")


def check_number(name: str, value: Any) -> None:
    """Refuse what is no real number, or none that a float can hold; NaN and infinity pass.

    Raises:
      UserError: naming the argument and its value.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} must be a number")
    try:
        float(value)
    except OverflowError:
        raise UserError(f"{name}={shown(value)} must be a finite number") from None


def check_type(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Refuse what is not of a type, described in words as `expected`.

    Raises:
      UserError: naming the argument and its value.
    """
    if not isinstance(value, kind):
        raise UserError(f"{name}={shown(value)} must be {expected}")


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: "no" would count as yes.

    Raises:
      UserError: naming the argument and its value.
    """
    check_type(name, value, bool, "True or False")
