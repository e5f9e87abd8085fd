"""Checks of JSON values, each with the path of the field that its error names.

A check takes a value and its path, and returns the value as the server uses it.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from orthrus_jax.server.problems import ApiError, invalid
from orthrus_jax.values import SHOWN, is_whole, shown

Check = Callable[[Any, str], Any]


def wrong(value: Any, path: str, expected: str) -> ApiError:
    """The refusal of a value."""
    return invalid(f"{path}={shown(value)}: expected {expected}", path)


def boolean(value: Any, path: str) -> bool:
    """Check for true or false."""
    if not isinstance(value, bool):
        raise wrong(value, path, "true or false")
    return value


def whole(least: int, most: int) -> Check:
    """A check for an integer from `least` to `most`."""

    def check(value: Any, path: str) -> int:
        if not is_whole(value) or not least <= value <= most:
            raise wrong(value, path, f"a whole number from {least} to {most}")
        return value

    return check


def number(holds: Callable[[float], bool], expected: str) -> Check:
    """A check for a finite number that `holds`."""

    def check(value: Any, path: str) -> float:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or abs(value) > 1e300 or not math.isfinite(value) or not holds(value):
            raise wrong(value, path, expected)
        return float(value)

    return check


def text(least: int = 0, most: int | None = None) -> Check:
    """A check for a string of so many characters, all of which are Unicode."""

    def check(value: Any, path: str) -> str:
        if not isinstance(value, str) or len(value) < least:
            raise wrong(value, path, "a string" if not least else "a string, not empty")
        if most is not None and len(value) > most:
            raise wrong(value, path, f"at most {most} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise wrong(value, path, "Unicode text, without lone surrogates") from None
        return value

    return check


def one_of(*values: Any) -> Check:
    """A check for one of a few values; 0 and false differ."""

    def check(value: Any, path: str) -> Any:
        if not any(type(value) is type(other) and value == other for other in values):
            raise wrong(value, path, f"one of {', '.join(map(repr, values))}")
        return value

    return check


def list_of(item: Check, least: int = 0, most: int | None = None) -> Check:
    """A check for a list of `least` to `most` items."""

    def check(value: Any, path: str) -> list:
        if not isinstance(value, list) or len(value) < least:
            raise wrong(value, path, "a list" if not least else f"a list of at least {least}")
        if most is not None and len(value) > most:
            raise invalid(f"{path} has {len(value)} items: expected at most {most}", path)
        return [item(x, f"{path}[{i}]") for i, x in enumerate(value)]

    return check


def object_of(
    fields: Mapping[str, Check], required: Collection[str] = (), *, open_: bool = False
) -> Check:
    """A check for an object with these fields; null is a field left out.

    With `open_` other fields are kept as they are.
    """

    def check(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(value, path or "the body", "a JSON object")
        inner = lambda name: f"{path}.{name}" if path else name
        given = {name: x for name, x in value.items() if x is not None}
        result = {}
        for name, x in given.items():
            if name not in fields and not open_:
                field = inner(name if len(name) <= SHOWN else f"{name[:SHOWN]}...")
                raise invalid(f"{field}: this server has no such field", field)
            result[name] = fields[name](x, inner(name)) if name in fields else x
        for name in required:
            if name not in given:
                raise invalid(f"{inner(name)} is missing", inner(name))
        return result

    return check


def any_object(value: Any, path: str) -> dict[str, Any]:
    """Check for an object, with any fields."""
    return object_of({}, open_=True)(value, path)


def only(*values: Any, why: str) -> Check:
    """A check for a field of the protocol of which this server has nothing but the default."""

    def check(value: Any, path: str) -> None:
        if not any(type(value) is type(other) and value == other for other in values):
            raise invalid(f"{path} is not supported: {why}", path, "unsupported_parameter")

    return check
