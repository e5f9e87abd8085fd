"""Two replicas under Ray Serve: texts are right, one may die, their number may change."""

import collections
import threading
import time
from concurrent import futures

import httpx
import pytest

import orthrus_jax

pytestmark = pytest.mark.slow
ray = pytest.importorskip("ray")
serve = pytest.importorskip("ray.serve")
URL = "http://127.0.0.1:8000/v1/chat/completions"
PROMPTS = [f"Tom has {i} apples and buys {i + 3} more." for i in range(10)]


def ask(i: int) -> httpx.Response:
    messages = [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}]
    body = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 30}
    return httpx.post(URL, json=body, timeout=300)


def deploy(arguments: dict, replicas: int) -> None:
    from orthrus_jax import replicas as module

    module.DEPLOYMENT = module.DEPLOYMENT.options(num_replicas=replicas)
    serve.run(module.build(arguments), name="orthrus")


def served(count: int) -> list[httpx.Response]:
    with futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, range(count)))


def text_of(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def arguments(tiny_base):
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield {"model": str(tiny_base), "served_name": "m", "max_context": 256, "max_batch": 4,
           "dtype": "float32", "no_baseline": True, "no_structured": True}  # fmt: skip
    serve.shutdown()
    ray.shutdown()


def test_replicas_answer_survive_a_death_and_change_their_number(arguments) -> None:
    model = orthrus_jax.load(arguments["model"], dtype="float32")
    expected = [completion.text for completion in model.generate(PROMPTS, max_new_tokens=30)]
    deploy(arguments, 2)
    right = lambda i, response: text_of(response) == expected[i % len(PROMPTS)]
    assert all(right(i, r) for i, r in enumerate(served(100)))

    def kill_one() -> None:
        time.sleep(1)
        actors = ray.util.list_named_actors(all_namespaces=True)
        replica = next(a for a in actors if "Replica" in a["name"] or "orthrus#" in a["name"])
        ray.kill(ray.get_actor(replica["name"], namespace=replica["namespace"]))

    killer = threading.Thread(target=kill_one)
    killer.start()
    responses = served(100)
    killer.join()
    kinds = collections.Counter(response.status_code for response in responses)
    assert kinds[200] >= 100 - 8, kinds
    assert all(right(i, r) for i, r in enumerate(responses) if r.status_code == 200)
    assert all(r.text for r in responses if r.status_code != 200), "an error that says so"

    for replicas in (1, 2):
        change = threading.Thread(target=deploy, args=(arguments, replicas))
        change.start()
        assert all(right(i, r) for i, r in enumerate(served(40))), "no request is lost"
        change.join()
