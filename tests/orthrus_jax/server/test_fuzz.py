"""Malformed bodies over the wire: each is refused with 4xx, and the engine lives."""

import json
import random

import pytest

from tests.support.server import Running

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
VALUES = [
    *(None, True, False, 0, -1, 1, 2.5, 10**30, -0.0, 1e308, "", "x", "\ud800", "<|im_start|>"),
    *([], {}, [[]], [{}], {"type": "x"}, [None], "A" * 5000, list(range(300)), {"a": {"b": [1]}}),
    *(
        "../../etc/passwd",
        "file:///etc/passwd",
        "\x00",
        "{{ 7 * 7 }}",
        [[1, 2], [3]],
        [-1],
        [10**9],
    ),
]


def places(value) -> list[tuple]:
    """The paths of all values inside a JSON value."""
    if not isinstance(value, dict | list):
        return [()]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [(), *[(key, *rest) for key, one in inner for rest in places(one)]]


def mutated(body, dice: random.Random):
    """The body with a value replaced, dropped or added somewhere."""
    body = json.loads(json.dumps(body))
    *path, last = dice.choice([p for p in places(body) if p])
    inside = body
    for key in path:
        inside = inside[key]
    kind = dice.random()
    if kind < 0.15:
        del inside[last]
    elif kind < 0.3 and isinstance(inside, dict):
        name = dice.choice(["x", "top_logprobs", "suffix", "\u0000", "\ud800", "n", "seed"])
        inside[name] = dice.choice(VALUES)
    else:
        inside[last] = dice.choice(VALUES)
    return body


def corrupted(text: bytes, dice: random.Random) -> bytes:
    """The bytes with some of them changed, doubled or cut off."""
    data = bytearray(text)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(data) + 1)
        kind = dice.randrange(4)
        if kind == 0:
            data[at:at] = bytes(dice.choices(range(256), k=dice.randint(1, 5)))
        elif kind == 1:
            del data[at : at + dice.randint(1, 9)]
        elif kind == 2:
            data[at : at + 1] = dice.choice([b'"', b"{", b"]", b"\\", b"NaN", b"1e999", b"\\ud800"])
        else:
            data = data[: max(at, 1)]
    return bytes(data)


def check(server: Running, count: int, seed: int) -> None:
    dice, statuses = random.Random(seed), dict[int, int]()
    for i in range(count):
        path = dice.choice(list(VALID))
        body = VALID[path]
        for _ in range(dice.randint(1, 3)):
            body = mutated(body, dice) if isinstance(body, dict) and body else VALID[path]
        content = json.dumps(body).encode()
        if dice.random() < 0.4:
            content = corrupted(content, dice)
        response = server.http.post(
            path, content=content, headers={"content-type": "application/json"}
        )
        shown = (seed, i, content, response.text)
        assert response.status_code == 200 or 400 <= response.status_code < 500, shown
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}, shown
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
    assert statuses[400] > count / 2, "most are malformed"
    assert server.chat().status_code == 200
    server.wait_until_idle()


@pytest.mark.parametrize("seed", range(3))
def test_malformed_bodies_are_refused(server, seed) -> None:
    check(server, 120, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 20))
def test_ten_thousand_malformed_bodies_are_refused(server, seed) -> None:
    check(server, 1000, seed)
