"""Values as lines of JSON between the program's process and the tests', exact and without trust.

Texts, small integers, floats, booleans, None and lists are themselves; any other value is an object
of one key, its type. An instance of a subclass travels as its base, so no `__eq__` of a program
arrives with it. Any other object stays where it is and travels as a number. Knows no message's
meaning.
"""

import builtins
import json
import sys
from collections.abc import Callable
from typing import Any

SMALL = 1 << 63  # integers from here on travel in base 16, which is read in linear time
LONGEST = 16 << 20  # bytes of a line


def _decimal(text: str) -> Any:
    import decimal

    return decimal.Decimal(text)


def _fraction(text: str) -> Any:
    import fractions

    return fractions.Fraction(text)


def _builtin_type(name: str) -> type:
    kind = getattr(builtins, name)
    if not isinstance(kind, type):
        raise TypeError(f"{name} is no type")
    return kind


BUILD: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "complex": lambda parts: complex(*parts),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "tuple": tuple,
    "dict": dict,
    "set": set,
    "frozenset": frozenset,
    "range": lambda ends: range(*ends),
    "type": _builtin_type,
    "Decimal": _decimal,
    "Fraction": _fraction,
}


def pack(value: Any, refer: Callable[[object], int]) -> Any:
    """A value as what JSON can hold; `refer` numbers an object that is not plain."""
    items = lambda: [pack(item, refer) for item in value]
    match value:
        case None | bool() | float() | str():
            return value
        case int():
            return value if -SMALL < value < SMALL else {"int": hex(value)}
        case list():
            return items()
        case tuple() | set() | frozenset():
            base = next(b for b in (tuple, set, frozenset) if isinstance(value, b))
            return {base.__name__: items()}
        case dict():
            return {"dict": [[pack(k, refer), pack(v, refer)] for k, v in value.items()]}
        case bytes() | bytearray():
            return {"bytes" if isinstance(value, bytes) else "bytearray": value.hex()}
        case complex():
            return {"complex": [value.real, value.imag]}
        case range():
            return {"range": [pack(n, refer) for n in (value.start, value.stop, value.step)]}
        case type(__name__=name) if getattr(builtins, name, None) is value:
            return {"type": name}
    for module, name in (("decimal", "Decimal"), ("fractions", "Fraction")):
        if module in sys.modules and isinstance(value, getattr(sys.modules[module], name)):
            return {name: str(value)}
    return {"object": refer(value)}


def dump(message: list[Any], refer: Callable[[object], int]) -> bytes:
    """A message as one line."""
    return json.dumps([pack(part, refer) for part in message]).encode() + b"\n"


def load(line: bytes, resolve: Callable[[int], object]) -> list[Any]:
    """The message of a line; `resolve` gives the object of a number.

    Raises:
      ValueError: for anything that is no such line.
    """

    def build(tagged: dict[str, Any]) -> Any:
        ((tag, content),) = tagged.items()
        return resolve(content) if tag == "object" else BUILD[tag](content)

    try:
        message = json.loads(line, object_hook=build)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"no value: {type(error).__name__}") from None
    if not isinstance(message, list) or not message:
        raise ValueError("no message")
    return message
