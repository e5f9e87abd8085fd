"""Two replicas under Ray Serve: texts are right, one may die, their number may change."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import httpx
import pytest

import orthrus_jax
from orthrus_jax.checkpoint import save_checkpoint
from tests.support.configs import tiny_config
from tests.support.engine import TEXTS
from tests.support.paths import ROOT
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

pytestmark = pytest.mark.slow
for check in ("READY", "HEALTH"):  # the proxy's, in seconds: two busy cores take longer than 5
    os.environ.setdefault(f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S", "120")
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
PORT = 8127
URL = f"http://127.0.0.1:{PORT}"
PROMPTS = [f"They are {i} apples and {i + 30} trees." for i in range(10)]
LONG = 400  # tokens: an answer that is still written when a replica dies
SIZES = {"vocab_size": 400, "mask_token_id": 399, "num_hidden_layers": 1, "eos_token_ids": ()}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a small model with random weights, quick to compile."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    config = tiny_config(**SIZES, max_position_embeddings=512, dtype="float32")
    weights = random_params(config, 3, gain=3.0)
    save_checkpoint(path, config, weights, tokenizer=small_tokenizer(TEXTS, 400))
    return str(path)


@pytest.fixture(scope="module")
def deploy(model) -> Any:
    """A function that deploys so many replicas and returns when all of them answer."""
    from orthrus_jax import replicas

    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}},
    )
    for _ in range(3):  # two busy cores may take longer than the 60 seconds that Ray waits
        with contextlib.suppress(TimeoutError):
            serve.start(http_options={"port": PORT})
            break
    arguments = {"model": model, "served_name": "m", "max_context": 450, "max_batch": 4,
                 "no_baseline": True, "no_structured": True}  # fmt: skip

    def deployed(count: int) -> None:
        replicas.DEPLOYMENT = replicas.DEPLOYMENT.options(num_replicas=count)
        serve.run(replicas.build(arguments), name="orthrus")

    yield deployed
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="module")
def expected(model) -> Callable[[int, int], str]:
    """The text of prompt i, cut to so many tokens, as the library alone writes it."""
    alone = orthrus_jax.load(model)
    texts = {
        tokens: [c.text for c in alone.generate(PROMPTS, max_new_tokens=tokens)]
        for tokens in (30, LONG)
    }
    return lambda i, tokens: texts[tokens][i % len(PROMPTS)]


class Failed(str):
    """What a client was told in place of an answer."""


def ask(i: int, tokens: int = 30) -> str:
    """The answer to prompt i, every other one from a stream; or what came in its place."""
    stream = i % 2 == 1
    messages = [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": tokens}
    try:
        response = httpx.post(
            f"{URL}/v1/chat/completions", json=body | {"stream": stream}, timeout=300
        )
    except httpx.HTTPError as error:
        return Failed(error)
    if response.status_code != 200:
        return Failed(f"status {response.status_code}: {response.text}")
    if not stream:
        return response.json()["choices"][0]["message"]["content"]
    *events, end, rest = response.text.split("\n\n")
    if (end, rest) != ("data: [DONE]", ""):
        return Failed(f"a stream without an end: {response.text[-300:]}")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)


def replica_names() -> set[tuple[str, str]]:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {(a["name"], a["namespace"]) for a in actors if a["name"].startswith("SERVE_REPLICA")}


def running_replicas() -> int:
    (deployment,) = serve.status().applications["orthrus"].deployments.values()
    return dict(deployment.replica_states).get("RUNNING", 0)


def wait_for(holds: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_two_replicas_answer_a_hundred_requests(deploy, expected) -> None:
    deploy(2)
    with futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(100)))
    assert answers == [expected(i, 30) for i in range(100)]


def test_replica_that_dies_costs_what_it_was_answering_and_comes_back(deploy, expected) -> None:
    deploy(2)
    name, namespace = sorted(replica_names())[0]
    begun: dict[int, float] = {}
    lengths = [LONG] * 24 + [30] * 76

    def timed(i: int) -> str:
        begun[i] = time.monotonic()
        return ask(i, lengths[i])

    with futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(timed, i) for i in range(100)]
        next(futures.as_completed(calls))
        ray.kill(ray.get_actor(name, namespace=namespace))
        killed = time.monotonic()
        answers = [call.result() for call in calls]
    failed = {i: str(answer) for i, answer in enumerate(answers) if isinstance(answer, Failed)}
    print("failed:", {text: [f"{begun[i] - killed:.2f} s" for i in failed if failed[i] == text]
                      for text in failed.values()})  # fmt: skip
    assert 0 < len(failed) <= 8
    assert all(begun[i] < killed + 1 for i in failed), "later ones go to the other"
    for i, answer in enumerate(answers):
        assert i in failed or answer == expected(i, lengths[i])
    wait_for(lambda: running_replicas() == 2)
    assert (name, namespace) not in replica_names()
    with futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    assert answers == [expected(i, 30) for i in range(40)]


def test_official_client_asks_again_when_a_replica_dies(deploy, expected) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", timeout=300)  # two retries
    deploy(2)
    name, namespace = sorted(replica_names())[0]

    def chat(i: int) -> str:
        messages = [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}]
        answer = client.chat.completions.create(
            model="m", messages=messages, temperature=0, max_tokens=LONG
        )
        return answer.choices[0].message.content

    with futures.ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(chat, i) for i in range(24)]
        next(futures.as_completed(calls))
        ray.kill(ray.get_actor(name, namespace=namespace))
        assert [call.result() for call in calls] == [expected(i, LONG) for i in range(24)]
    wait_for(lambda: running_replicas() == 2)


@pytest.mark.parametrize("count", [1, 2])
def test_change_of_their_number_loses_no_request(deploy, expected, count) -> None:
    deploy(3 - count)
    change = threading.Thread(target=deploy, args=(count,))
    answers: list[str] = []
    with futures.ThreadPoolExecutor(8) as pool:
        change.start()
        while change.is_alive() or len(answers) < 100:
            answers += pool.map(ask, range(len(answers), len(answers) + 20))
    change.join()
    assert answers == [expected(i, 30) for i in range(len(answers))]
    wait_for(lambda: running_replicas() == count)
