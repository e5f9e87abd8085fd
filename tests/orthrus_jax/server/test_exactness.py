"""Over the wire, under load: each text is what the model generates alone."""

import json
import random
import threading
import time
from concurrent import futures

import numpy as np
import pytest

from orthrus_jax.engine import SamplingParams
from orthrus_jax.llm import LLM
from orthrus_jax.server import Settings
from tests.orthrus_jax.server.test_failures import raw
from tests.support.engine import hashing
from tests.support.server import SETTINGS, Running, running

WORDS = [
    "six",
    "green",
    "apples",
    "and",
    "12",
    "trees",
    "in",
    "the",
    "Garden",
    "of",
    "a",
    "Käfer",
    "are",
    "42",
    ".",
]


def requests_of(count: int, seed: int) -> list[dict]:
    """Chats of mixed options; some begin alike, some continue others."""
    dice, histories, requests = random.Random(seed), [[]], []
    for i in range(count):
        history = dice.choice(histories)[-4:]
        text = " ".join(dice.choices(WORDS, k=dice.randint(1, 12)))
        messages = [*history, {"role": "user", "content": text}]
        options = {"messages": messages, "max_tokens": dice.randint(1, 60), "temperature": 0}
        if i % 3 == 1:
            options |= {"temperature": dice.choice([0.5, 1.0]), "seed": i}
            options |= dice.choice([{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}])
        if i % 5 == 2:
            options["stop"] = dice.choice(["e", "a ", ["7", "Ap"]])
        options["stream"] = dice.random() < 0.5
        if i % 4 == 0:
            answer = {"role": "assistant", "content": "yes " * dice.randint(1, 4)}
            histories.append([*messages, answer])
        requests.append(options)
    return requests


def alone(model: LLM, options: dict) -> str:
    """The text that `generate` gives."""
    names = {"max_tokens": "max_new_tokens"}
    fields = {
        names.get(name, name): value
        for name, value in options.items()
        if name not in ("messages", "stream", "stop")
    }
    stop = options.get("stop", ())
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    (completion,) = model.generate(
        [options["messages"]], SamplingParams(**fields, stop=stop), mode="orthrus"
    )
    return completion.text


def text_of(response) -> str:
    if not response.headers["content-type"].startswith("text/event-stream"):
        return response.json()["choices"][0]["message"]["content"]
    parts = [p.removeprefix("data: ") for p in response.text.split("\n\n")[:-2]]
    return "".join(json.loads(p)["choices"][0]["delta"]["content"] for p in parts)


def served(server: Running, requests: list[dict], concurrency: int, disturbed=()) -> list[str]:
    """Texts of requests that arrive at random, `disturbed` by other clients."""
    rng = np.random.default_rng(0)
    delays = rng.exponential(0.01, len(requests)).tolist()

    def ask(i: int) -> str:
        time.sleep(delays[i])
        response = server.chat(**requests[i])
        assert response.status_code == 200, response.text
        return text_of(response)

    threads = [threading.Thread(target=one) for one in disturbed]
    for thread in threads:
        thread.start()
    with futures.ThreadPoolExecutor(concurrency) as pool:
        texts = list(pool.map(ask, range(len(requests))))
    for thread in threads:
        thread.join()
    return texts


def leaving(server: Running, count: int) -> None:
    """Clients that go away while their answers are written."""
    for i in range(count):
        body = {"model": "hash", "messages": [{"role": "user", "content": f"bye {i}"}]}
        body |= {"temperature": 0, "max_tokens": 150, "stream": i % 2 == 0}
        with raw(server, json.dumps(body).encode()):
            time.sleep(0.02)


def breaking(server: Running, count: int) -> None:
    """Requests that are over the context, or broken."""
    for i in range(count):
        wrong = [{"messages": [{"role": "user", "content": "long " * 300}]}, {"max_tokens": 10**6}]
        wrong += [{"temperature": "hot"}, {"stop": 5}, {"model": "other"}]
        assert 400 <= server.chat(**wrong[i % len(wrong)]).status_code < 500


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_texts_under_load_are_those_of_generate_alone(server, count) -> None:
    requests, model = requests_of(count, seed=count), hashing.__wrapped__()
    texts = served(server, requests, 16)
    for options, text in zip(requests, texts, strict=True):
        assert text == alone(model, options), options
    server.wait_until_idle()
    cached = [x for x in server.http.get("/metrics").text.split("\n") if "cached" in x]
    assert float(cached[-1].split()[-1]) > 0, "prefixes were reused"


@pytest.mark.parametrize(
    ("left", "broken"), [(10, 5), pytest.param(50, 20, marks=pytest.mark.slow)]
)
def test_disconnects_and_broken_requests_cost_no_row_and_no_text(server, left, broken) -> None:
    requests, model = requests_of(30, seed=left), hashing.__wrapped__()
    disturbed = [lambda: leaving(server, left), lambda: breaking(server, broken)]
    texts = served(server, requests, 8, disturbed)
    assert texts == [alone(model, options) for options in requests]
    server.wait_until_idle()
    together = served(server, requests[: SETTINGS.max_batch], SETTINGS.max_batch)
    assert together == texts[: SETTINGS.max_batch], "every row is there"


@pytest.mark.slow
def test_real_models_texts_are_those_of_generate_alone(tiny_base) -> None:
    """The demo's base in float32, where a near-tie of the two readings is not to be expected."""
    import orthrus_jax

    model = orthrus_jax.load(tiny_base, dtype="float32")
    requests = requests_of(30, seed=3)
    settings = Settings(name="hash", max_batch=4, max_context=512, baseline=False)
    with running(model, settings) as server:
        texts = served(server, requests, 8)
    assert texts == [alone(model, options) for options in requests]
