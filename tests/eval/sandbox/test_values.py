"""Values between program and tests: exact, of plain types, rebuilt and never trusted."""

import collections
import enum
import json
import math
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.confined import values
from eval.sandbox import Suite, check_program
from tests.support.sandbox import needs_posix

NUMBERS = (
    st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False) | st.fractions()
)  # fmt: skip
PLAIN = st.none() | st.booleans() | NUMBERS | st.text() | st.binary()
HASHABLE = st.recursive(PLAIN, lambda x: st.tuples(x, x) | st.frozensets(x), max_leaves=6)
VALUES = st.recursive(
    HASHABLE | st.binary().map(bytearray),
    lambda x: st.lists(x) | st.tuples(x) | st.sets(HASHABLE) | st.dictionaries(HASHABLE, x),
    max_leaves=12,
)


def carried(value: object) -> object:
    return values.load(values.dump([value], id), lambda number: number)[0]


@given(VALUES)
def test_plain_values_arrive_exactly(value):
    arrived = carried(value)
    assert type(arrived) is type(value)
    assert arrived == value
    assert repr(carried([value])) == repr([arrived])


@pytest.mark.parametrize(
    "value",
    [10**5000, -(2**63), 2**63, -0.0, math.inf, "\ud800", range(3, 9, 2), {(1, "a"): [{2}]}, int],
    ids=type,
)
def test_rare_values_arrive_exactly(value):
    assert carried(value) == value
    assert type(carried(value)) is type(value)


def test_subclasses_arrive_as_their_base():
    point = collections.namedtuple("point", "x y")
    color = enum.IntEnum("color", "red")

    class Liar(str):
        __slots__ = ()

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

    for value, base in ((point(1, 2), tuple), (collections.Counter("a"), dict), (Liar("x"), str)):
        assert type(carried(value)) is base
        assert carried(value) == base(value)
    assert carried(color.red) == 1
    assert carried(Liar("x")) != "y"
    assert carried(True) is True


@pytest.mark.parametrize(
    "line",
    [
        b"", b"x\n", b"{}\n", b"[]\n", b"[1", b'[{"tuple": 1}]\n', b'[{"set": [[1]]}]\n',
        b'[{"a": 1, "b": 2}]\n', b'[{"type": "eval"}]\n', b'[{"type": "x"}]\n', b"\xff\n",
        b'[{"int": "x"}]\n', b"[" * 100_000, b'[{"object": "x"}]\n', b'[{"Decimal": "x"}]\n',
    ],
)  # fmt: skip
def test_anything_else_is_no_value(line):
    with pytest.raises(ValueError, match=r"no value|no message"):
        values.load(line, [].__getitem__)


@given(
    st.recursive(
        PLAIN.filter(lambda x: not isinstance(x, complex | bytes | Decimal | Fraction)),
        lambda x: st.lists(x) | st.dictionaries(st.text() | st.sampled_from(list(values.BUILD)), x),
    )
)
def test_any_json_is_a_value_or_refused(tree):
    try:
        message = values.load(json.dumps([tree]).encode(), [].__getitem__)
    except ValueError:
        return
    assert isinstance(message, list)


PROGRAM = """
import collections

class Odd(Exception): pass

def echo(*args, **named): return [args, named] if named else args
def fail(kind): raise kind("why")
def odd(): raise Odd("why")
def bad(): b"\\xff".decode()
def count(n):
    while True:
        yield n
        n += 1
def append(items): items.append(1)
def deep(): x = []; x.append(x); return x
def large(): return "x" * (1 << 25)
class Box:
    def __init__(self, x): self.x = x
    def get(self): return self.x
    def __eq__(self, other): return True
box = Box(1)
LIMIT = 5
"""


@needs_posix
@pytest.mark.parametrize(
    ("tests", "status"),
    [
        ("assert echo(1, a=[2]) == [(1,), {'a': [2]}]", "passed"),
        ("assert LIMIT == 5 and absent_is_unknown", "failed"),
        ("try: fail(OSError)\nexcept OSError as e: assert str(e) == 'why'\nelse: 1 / 0", "passed"),
        ("try: odd()\nexcept Exception as e: assert 'why' in str(e)", "passed"),
        ("try: bad()\nexcept RuntimeError as e: assert 'UnicodeDecodeError' in str(e)", "passed"),
        ("fail(ValueError)", "failed"),
        ("import itertools\nassert list(itertools.islice(count(3), 2)) == [3, 4]", "passed"),
        ("x = [0]\nappend(x)\nassert x == [0]", "passed"),  # by value
        ("assert box.get() == 1 == box.x\nbox.x = {2}\nassert box.get() == {2}", "passed"),
        ("assert box is box and box == box and echo(box)[0] is box", "passed"),
        ("assert box == 1", "failed"),
        ("assert Box(1) == Box(1)", "failed"),
        ("assert echo(lambda: 0)", "failed"),
        ("deep()", "failed"),
        ("try: large()\nexcept BaseException: pass", "failed"),
        ("assert fail(SystemExit)", "failed"),
        ("try: fail(SystemExit)\nexcept BaseException: pass", "failed"),
        ("try: fail(MemoryError)\nexcept BaseException: pass", "memory"),
        ("raise SystemExit", "failed"),
        ("def f(:", "failed"),
        ("import os\nos.fork()", "failed"),  # the tests are confined like the program
        ("while True: pass", "timeout"),
    ],
)  # fmt: skip
def test_tests_call_a_program_by_value(tests, status):
    names = ("echo", "fail", "odd", "bad", "count", "append", "box", "Box", "LIMIT", "deep",
             "large", "absent_is_unknown")  # fmt: skip
    result = check_program([[PROGRAM]], Suite(tests, "", names), seconds=3)
    assert result.status == status, result.stderr


@needs_posix
def test_first_version_that_compiles_is_run():
    suite = Suite("assert x == 2", "", ("x",))
    assert check_program([["y = 1"], ["def", "x = y + 1", "x = 3"]], suite).passed
    result = check_program([["def", "if"]], suite)
    assert "line 1\n    def" in result.stderr
