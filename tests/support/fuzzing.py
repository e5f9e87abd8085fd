"""Damaged files for readers: a valid file with its bytes or its JSON values changed.

A reader may take a damaged file or refuse it with a `UserError`; any other exception is a defect.
"""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from orthrus_jax.errors import UserError

CASES, SLOW_CASES = 200, 5000  # per reader: in every run, and under the mark slow

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\u2028", "\ud800", "NaN", "../x", "{}"]),
)
VALUES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
"""JSON values of every type, at the borders of their ranges too."""


def check_reader(
    read: Callable[[pathlib.Path], Any],
    *,
    slow: bool,
    path: pathlib.Path,
    contents: st.SearchStrategy[bytes],
) -> None:
    """Let `read` read many contents of the file `path`: each time a result, or a `UserError`.

    Args:
      read: gets `path`, and reads all of it (an iterator is run through).
      slow: with SLOW_CASES contents, not CASES.
      path: written anew for every case.
      contents: see `damaged_json`, `damaged_lines`.
    """

    @hypothesis.settings(
        max_examples=SLOW_CASES if slow else CASES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(contents)
    def one_case(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.suppress(UserError):
            read(path)

    one_case()


def damaged_json(valid: Any) -> st.SearchStrategy[bytes]:
    """A JSON file of `valid` with values or keys changed, with bytes changed, or of anything."""
    changed = _changed(valid).map(_dumps)
    return st.one_of(
        changed, changed, _damaged_bytes(_dumps(valid)), VALUES.map(_dumps), st.binary()
    )


def damaged_lines(valid: list[Any]) -> st.SearchStrategy[bytes]:
    """A file of JSON lines, of which some are changed as in `damaged_json`."""
    line = st.one_of(*(damaged_json(value) for value in valid), *map(st.just, map(_dumps, valid)))
    return st.lists(line, max_size=4).map(b"\n".join)


both_profiles = pytest.mark.parametrize(
    "slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "many"]
)
"""Parametrises a test by `slow`, for `check_reader`."""


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()  # surrogates as escapes, NaN as NaN


@st.composite
def _damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut a piece out of a file and put other bytes in its place."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 8)) | st.just(len(content)))
    return content[:start] + draw(st.binary(max_size=4)) + content[end:]


@st.composite
def _changed(draw: st.DrawFn, value: Any) -> Any:
    """Replace, remove or rename one to three values, however deep."""
    for _ in range(draw(st.integers(1, 3))):
        value = _change_once(draw, value)
    return value


def _change_once(draw: st.DrawFn, value: Any) -> Any:
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    action = draw(st.sampled_from(["enter", "enter", "enter", "replace", "remove", "rename"]))
    copy: Any = dict(value) if isinstance(value, dict) else list(value)
    if action == "enter":
        copy[key] = _change_once(draw, copy[key])
    elif action == "replace":
        copy[key] = draw(VALUES)
    elif action == "remove":
        del copy[key]
    elif isinstance(copy, dict):
        copy[draw(st.text(max_size=8))] = copy.pop(key)
    else:
        copy.insert(key, draw(VALUES))
    return copy
