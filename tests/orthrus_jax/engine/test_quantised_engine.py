"""Engine, sessions and the resident queue over a quantised cache: texts are a fresh prefill's."""

import numpy as np
import pytest

from orthrus_jax.attention import KVCacheConfig, QuantisedCache
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Capacity, Plan, Request, SamplingParams, Session
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from tests.support.configs import tiny_config
from tests.support.weights import random_params

CACHE = KVCacheConfig(4, 2, tile=8)
CONFIG = tiny_config(num_hidden_layers=1)
SAMPLED = {"temperature": 1.2, "seed": 3}
COUPLED = Strategy("orthrus", accept="coupled")


@pytest.fixture(scope="module")
def model() -> LLM:
    return LLM(CONFIG, random_params(CONFIG, 1, gain=2.0, copy=True), kv_cache=CACHE)


def prompts_of(*lengths: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 63, n).tolist() for n in lengths]


def test_batches_and_refills_answer_as_each_alone(model: LLM) -> None:
    prompts = prompts_of(3, 50, 17, 60, 31)
    sampling = [SamplingParams(max_new_tokens=n, **SAMPLED) for n in (40, 9, 30, 21, 40)]
    together = model.complete(prompts, sampling, strategy=COUPLED, batch_size=2)
    alone = [
        model.complete([p], [s], strategy="ar")[0] for p, s in zip(prompts, sampling, strict=True)
    ]
    assert [c.tokens for c in together] == [c.tokens for c in alone]
    assert max(sum(c.accepted) for c in together) > 0


def turn(model: LLM, prompt, session: Session):
    request = Request(prompt, SamplingParams(max_new_tokens=20, **SAMPLED))
    (event,) = model.engine.serve([request], Plan(COUPLED), session)
    return event.completion


def test_turns_answer_as_a_fresh_prefill_of_the_dialogue(model: LLM) -> None:
    session, history, cached = Session(slots=320), [], []
    for question in prompts_of(30, 25, 12, 40):
        prompt = history + question
        answer = turn(model, prompt, session)
        assert isinstance(session.cache, QuantisedCache)
        assert answer.tokens == turn(model, prompt, Session(320)).tokens
        cached.append(answer.cached_tokens)
        history = prompt + answer.tokens
    assert cached == [0, 49, 94, 126]
    # A template that rewrites what came long ago: its exact slots are gone, the sink is not.
    rewritten = history[:60] + prompts_of(20)[0]
    answer = turn(model, rewritten, session)
    assert answer.cached_tokens == CACHE.sink
    assert answer.tokens == turn(model, rewritten, Session(320)).tokens


def test_resident_rows_answer_as_each_alone(model: LLM) -> None:
    capacity = Capacity.announced(200, model.engine.lookahead(Plan(COUPLED)))
    queue = model.engine.open_resident(Plan(COUPLED, batch_size=2, stream=False), capacity)
    base, *others = prompts_of(70, 20, 9, 90)
    prompts = [base, [*base, *others[0]], [*base[:40], *others[1]], others[2], [*base, *others[1]]]
    for prompt in prompts:
        queue.submit(Request(prompt, SamplingParams(max_new_tokens=30, **SAMPLED)))
    answers = {}
    while queue.busy:
        answers |= {e.index: e.completion for e in queue.step() if e.completion is not None}
    queue.close()
    for i, prompt in enumerate(prompts):
        (alone,) = model.complete([prompt], max_new_tokens=30, strategy=COUPLED, **SAMPLED)
        assert answers[i].tokens == alone.tokens
    assert answers[1].cached_tokens > 60


def test_what_a_quantised_cache_cannot_do_is_refused(model: LLM) -> None:
    tree = Strategy("orthrus-2f", tree_nodes=8)
    with pytest.raises(UserError, match="cycle of 10 slots is over the 9 of kv_cache=k4v2"):
        model.complete([[1, 2]], strategy=tree)
    with pytest.raises(UserError, match="kv_cache='k3v3'"):
        LLM(CONFIG, {}, kv_cache="k3v3")
    with pytest.raises(UserError, match="head_dim=24"):
        LLM(tiny_config(head_dim=24), {}, kv_cache="k4v4")
