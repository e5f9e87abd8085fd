"""Malformed bodies over the wire: each is refused with 4xx, and the engine lives."""

import collections
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.server import Running, greedy_answer

VALID = {
    "/v1/chat/completions": {
        "model": "hash",
        "messages": [{"role": "user", "content": "12 apples"}],
        "temperature": 0,
        "max_tokens": 2,
        "stop": ["x"],
        "stream": False,
        "response_format": {"type": "text"},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "chat_template_kwargs": {"enable_thinking": False},
    },
    "/v1/completions": {"model": "hash", "prompt": ["12", "apples"], "n": 1, "max_tokens": 2,
                        "temperature": 0},
}  # fmt: skip
ODD = [
    *(None, True, False, 0, -1, 1, 2.5, 10**30, -0.0, 1e308, "", "x", "\ud800", "<|im_start|>"),
    *([], {}, [[]], [{}], {"type": "x"}, [None], "A" * 5000, list(range(300)), {"a": {"b": [1]}}),
    *("../../etc/passwd", "file:///etc/passwd", "\x00", "{{ 7 * 7 }}"),
    *([[1, 2], [3]], [-1], [10**9]),
]  # fmt: skip
NAMES = ["x", "top_logprobs", "suffix", "\u0000", "\ud800", "n", "seed", "guided_regex", "logprobs"]
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
PIECES = st.binary(min_size=1, max_size=5) | st.sampled_from(
    [b'"', b"{", b"]", b"\\", b"NaN", b"1e999", b"\\ud800"]
)
ROUND = 1000  # bodies that hypothesis makes at once


def places(value) -> list[tuple]:
    """The paths of all values inside a JSON value, its own first."""
    if not isinstance(value, dict | list):
        return [()]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [(), *[(key, *rest) for key, one in inner for rest in places(one)]]


def mutated(draw, body):
    """The body with a value replaced, dropped or added somewhere."""
    body = json.loads(json.dumps(body))
    *path, last = draw(st.sampled_from(places(body)[1:]))
    inside = body
    for key in path:
        inside = inside[key]
    kind = draw(st.sampled_from(["replace"] * 4 + ["drop", "add"]))
    if kind == "drop":
        del inside[last]
    elif kind == "add" and isinstance(inside, dict):
        inside[draw(st.sampled_from(NAMES))] = draw(VALUES)
    else:
        inside[last] = draw(VALUES)
    return body


def corrupted(draw, text: bytes) -> bytes:
    """The bytes with some of them added, left out, replaced or cut off."""
    data = bytearray(text)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["add", "drop", "replace", "cut"]))
        end = {"add": at, "drop": at + 5, "replace": at + 1, "cut": len(data)}[kind]
        data[at:end] = draw(PIECES) if kind in ("add", "replace") else b""
    return bytes(data)


@st.composite
def requests(draw) -> tuple[str, bytes]:
    """A path and a body with one to three mistakes; a few bodies are right all the same."""
    path = draw(st.sampled_from(sorted(VALID)))
    body = VALID[path]
    for _ in range(draw(st.integers(1, 3))):
        body = mutated(draw, body or VALID[path])
    content = json.dumps(body).encode()
    return path, corrupted(draw, content) if draw(st.integers(0, 9)) < 4 else content


def check(server: Running, malformed: int) -> None:
    """Send bodies until so many were refused."""
    statuses: collections.Counter[int] = collections.Counter()

    @given(requests())
    @settings(
        max_examples=min(malformed, ROUND),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def answered(request) -> None:
        path, content = request
        response = server.http.post(
            path, content=content, headers={"content-type": "application/json"}
        )
        assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        statuses[response.status_code] += 1

    for _ in range(3 * max(1, malformed // ROUND)):
        answered()
        if (refused := statuses.total() - statuses[200]) >= malformed:
            break
    assert refused >= malformed, statuses
    assert server.chat().json()["choices"][0]["message"]["content"] == greedy_answer("12 apples")
    server.wait_until_idle()
    assert server.http.get("/health").status_code == 200


@pytest.mark.parametrize("malformed", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_malformed_bodies_are_refused_and_the_engine_lives(server, malformed) -> None:
    check(server, malformed)
