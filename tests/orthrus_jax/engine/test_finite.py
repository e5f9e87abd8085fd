"""Logits that are not finite end in an error with row and position, in every loop."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.decoding import Strategy
from orthrus_jax.decoding.sampling import greedy
from orthrus_jax.engine import SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from tests.support.configs import tiny_config
from tests.support.weights import random_params

LOOPS = {
    "ar": Strategy("ar"),
    "paper": Strategy("orthrus"),
    "two-forward": Strategy("orthrus-2f"),
    "two-forward tree": Strategy("orthrus-2f", tree_nodes=5),
    "one-forward": Strategy("orthrus-1f", early_blocks=2),
    "one-forward tree": Strategy("orthrus-1f", tree_nodes=5, early_blocks=1, fresh_blocks=2),
}
CONFIG = tiny_config(num_hidden_layers=1, tie_word_embeddings=False)
NOT_FINITE = (
    r"request \d \(row \d\): the logits of answer token \d+, at position \d+, are not finite"
)


def with_value(params, value: float, where: str):
    """The parameters with one weight of the layer, or of the head, replaced."""
    path = {"layer": ("layers_0", "mlp", "down_proj", "weight"), "head": ("lm_head", "weight")}
    return jax.tree_util.tree_map_with_path(
        lambda at, leaf: (
            leaf.at[0, 0].set(value)
            if tuple(key.key for key in at)[-len(path[where]) :] == path[where]
            else leaf
        ),
        params,
    )


@pytest.mark.parametrize("heat", [0.0, 0.9], ids=["greedy", "sampled"])
@pytest.mark.parametrize("loop", LOOPS)
def test_weights_that_are_not_finite_give_no_token(loop: str, heat: float) -> None:
    params = random_params(CONFIG, 0)
    model = LLM(CONFIG, params)
    options = {"max_new_tokens": 9, "temperature": heat, "batch_size": 2, "strategy": LOOPS[loop]}
    prompts = [[1, 2, 3], [4, 5]]
    sound = [c.tokens for c in model.complete(prompts, **options)]
    assert all(0 <= token < CONFIG.vocab_size for tokens in sound for token in tokens)
    for value in (np.nan, np.inf, -np.inf):
        for where in ("layer", "head"):
            model.params = with_value(params, value, where)
            if value == -np.inf and where == "head":
                continue  # logits of -inf are an excluded token, where another is finite
            with pytest.raises(UserError, match=NOT_FINITE):
                model.complete(prompts, **options)
    model.params = params
    assert [c.tokens for c in model.complete(prompts, **options)] == sound, "the queue is sound"


def test_error_names_the_first_position_without_logits() -> None:
    params = random_params(CONFIG, 0)
    model = LLM(CONFIG, params)
    (whole,) = model.complete([[1, 2, 3]], strategy="ar", max_new_tokens=9)
    at = next(i for i, token in enumerate(whole.tokens) if token not in (1, 2, 3))
    model.params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf.at[whole.tokens[at]].set(jnp.nan) if path[-1].key == "embedding" else leaf
        ),
        params,
    )
    place = rf"\(row 0\): the logits of answer token {at + 1}, at position {at + 4}, are not"
    with pytest.raises(UserError, match=place):
        model.complete([[1, 2, 3]], strategy="ar", max_new_tokens=9)


@pytest.mark.parametrize("loop", LOOPS)
def test_least_temperatures_give_greedy_text_or_an_error(loop: str) -> None:
    model = LLM(CONFIG, random_params(CONFIG, 0))
    options = {"max_new_tokens": 5, "strategy": LOOPS[loop], "min_new_tokens": 1}
    greedy_tokens, _ = outcome(model, **options)
    for exponent in (-6, -10, -20, -30, -37, -45, -60, -320):
        tokens, message = outcome(model, temperature=10.0**exponent, **options)
        if tokens is None:
            assert re.search(NOT_FINITE + r".* is too small", message)
            assert exponent < -6
        else:
            assert tokens == greedy_tokens


def outcome(model: LLM, **options: Any) -> tuple[list[int] | None, str]:
    """The tokens of an answer, or the message of its refusal."""
    try:
        return model.complete([[1, 2, 3]], **options)[0].tokens, ""
    except UserError as error:
        return None, str(error)


def test_prompt_ids_and_stop_ids_are_within_the_vocabulary() -> None:
    model = LLM(CONFIG, random_params(CONFIG, 0))
    for loop in LOOPS.values():
        with pytest.raises(UserError, match="64 is not an id from 0 to 63"):
            model.complete([[64]], strategy=loop, max_new_tokens=3)
    with pytest.raises(UserError, match="not below the vocabulary's 64"):
        model.complete([[1]], SamplingParams(stop_token_ids=[64], max_new_tokens=3))


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([1.0, 3.0, 3.0], 1),
        ([-np.inf, -1.0, -2.0], 1),
        ([1.0, np.nan, 3.0], 3),
        ([1.0, np.inf, 3.0], 3),
        ([-np.inf, -np.inf, -np.inf], 3),
        ([np.nan, np.nan, np.nan], 3),
    ],
)
def test_largest_logit_that_is_not_finite_is_no_token(logits: list[float], expected: int) -> None:
    assert int(greedy(jnp.array(logits))) == expected
