"""Long contexts: prefill in chunks, 32 K positions, and bounded memory."""

import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.attention import cache
from orthrus_jax.attention.cache import KV_CHUNK
from orthrus_jax.config import ModelConfig
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model, ar_segment
from tests.support.cases import ATTENTION
from tests.support.compare import relative_error
from tests.support.configs import NO_EOS, tiny_config
from tests.support.decoding import assert_same_decoding, orthrus_decode
from tests.support.fake_models.drafted import DraftedModel
from tests.support.marks import slow
from tests.support.weights import random_params

CHUNK = decoding.PREFILL_CHUNK
LOOPS = {"ar": decoding.ar_decode, "orthrus": orthrus_decode}
on_cpu = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="a claim about XLA's CPU compiler"
)


@pytest.fixture(scope="module", params=ATTENTION)
def implementation(request) -> str:
    return request.param


# Prefill in chunks


CONFIG = tiny_config(max_position_embeddings=8192)
PADDED = 2 * CHUNK + 128  # no multiple of the chunk: the last one is moved back
LENGTHS = {
    "at the borders": [CHUNK, 2 * CHUNK, CHUNK + 1, CHUNK - 1],
    "ragged": [PADDED, 300, 1, 777],
    "none fills the width": [2 * CHUNK - 5, 3, 64, CHUNK + 2],
    "all in one chunk": [3, 300, 64, CHUNK],
}


def ids_of(seed: int, batch: int, width: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 63, (batch, width)), jnp.int32)


@functools.cache
def in_one_piece(slots: int):
    """One forward over all rows, each with one plain softmax: the last logits, and the cache."""

    @jax.jit
    def read(params, tokens, lengths):
        model = Model(CONFIG)
        rows = ar_segment(tokens, jnp.zeros_like(lengths))
        kept = model.init_cache(tokens.shape[0], slots)
        with mock.patch.object(cache, "CHUNK_ABOVE", 1 << 30):
            (hidden,), kept = model.forward(params, [rows], kept)
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        return model.logits(params, last), kept

    return read


def budget_of(lengths, tokens: int):
    return jnp.full(len(lengths), tokens, jnp.int32)


def prefilled(model, params, tokens, lengths, *, slots: int, new: int = 24, **resumed):
    return decoding.prefill(
        model,
        params,
        tokens,
        jnp.asarray(lengths, jnp.int32),
        budget_of(lengths, new),
        NO_EOS,
        slots=slots,
        max_new_tokens=new,
        logprobs=True,
        **resumed,
    )


def assert_same_live_cache(actual, expected, lengths) -> None:
    live = jnp.arange(actual.k[0].shape[-1]) < jnp.asarray(lengths)[:, None]
    for ours, theirs in zip(actual.k, expected.k, strict=True):
        rows = live[:, None, None, :]
        assert relative_error(ours * rows, theirs * rows) < 2e-5
    for ours, theirs in zip(actual.v, expected.v, strict=True):
        rows = live[:, None, :, None]
        assert relative_error(ours * rows, theirs * rows) < 2e-5


@pytest.mark.parametrize("case", LENGTHS)
@pytest.mark.parametrize("width", [PADDED, *slow(2 * CHUNK)])
def test_chunked_prefill_equals_one_big_forward(implementation, case: str, width: int) -> None:
    lengths, slots = [min(n, width) for n in LENGTHS[case]], 3 * KV_CHUNK
    params, tokens = random_params(CONFIG, 0), ids_of(1, 4, width)
    logits, expected = in_one_piece(slots)(params, tokens, jnp.asarray(lengths, jnp.int32))
    model = Model(CONFIG, attention=implementation)
    state = prefilled(model, params, tokens, lengths, slots=slots)
    assert_same_live_cache(state.cache, expected, lengths)
    assert state.position.tolist() == lengths
    assert state.count.tolist() == [1] * 4
    np.testing.assert_array_equal(state.tokens[:, 0], logits[:, 0].argmax(axis=-1))
    log_p = jax.nn.log_softmax(logits[:, 0]).max(axis=-1)
    np.testing.assert_allclose(state.logprobs[:, 0], log_p, rtol=2e-5, atol=2e-5)


def text_by_whole_forwards(params, prompt: list[int], new: int) -> list[int]:
    """Greedy text with a forward over everything for each token: no cache, no chunk, no loop."""
    ids = list(prompt)
    for _ in range(new):
        tokens = jnp.asarray([ids + [0] * (len(prompt) + new - len(ids))], jnp.int32)
        logits, _ = in_one_piece(PADDED + 64)(params, tokens, jnp.asarray([len(ids)]))
        ids.append(int(logits[0, 0].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("loop", LOOPS)
def test_text_after_chunked_prefill_equals_that_after_one_big_forward(implementation, loop) -> None:
    params, tokens, new = random_params(CONFIG, 1), ids_of(2, 4, PADDED), 24
    lengths = [PADDED, 300, CHUNK, 2 * CHUNK + 1]
    model = Model(CONFIG, attention=implementation)
    state = prefilled(model, params, tokens, lengths, slots=3 * KV_CHUNK, new=new)
    state = LOOPS[loop](model, params, state)
    for row in (0, 1, 2, 3) if loop == "ar" else (0, 2):
        prompt = tokens[row, : lengths[row]].tolist()
        assert state.tokens[row].tolist() == text_by_whole_forwards(params, prompt, new)


@pytest.mark.parametrize("first", [1, 200, *slow(CHUNK, 700)])
def test_resumed_chunked_prefill_equals_one_of_the_whole(implementation, first: int) -> None:
    params, tokens, slots = random_params(CONFIG, 2), ids_of(3, 1, PADDED), 4 * KV_CHUNK
    model = Model(CONFIG, attention=implementation)
    whole = prefilled(model, params, tokens, [PADDED], slots=slots)
    begun = prefilled(model, params, tokens[:, :768], [first], slots=slots)
    rest = jnp.zeros((1, PADDED), jnp.int32).at[:, : PADDED - first].set(tokens[:, first:])
    state = prefilled(
        model,
        params,
        rest,
        [PADDED - first],
        slots=slots,
        cache=begun.cache,
        start=jnp.asarray([first], jnp.int32),
    )
    assert int(state.position[0]) == PADDED
    assert state.tokens[0, 0] == whole.tokens[0, 0]
    as_batch = lambda kept: jax.tree.map(lambda x: x[None] if x.ndim == 3 else x, kept)
    assert_same_live_cache(as_batch(state.cache), as_batch(whole.cache), [PADDED])
    for name in LOOPS:
        again, plain = (
            LOOPS[name](model, params, jax.tree.map(jnp.copy, s)) for s in (state, whole)
        )
        assert again.tokens.tolist() == plain.tokens.tolist()


# Whole answers after long prompts


def long_config(**changes) -> ModelConfig:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_config(**sizes | {"tie_word_embeddings": False} | changes)


def both_texts(config: ModelConfig, prompt: list[int], new: int) -> tuple[list[int], list[int]]:
    model = LLM(config, random_params(config, 0, gain=2.5))
    ar, orthrus = (
        model.complete([prompt], strategy=mode, max_new_tokens=new)[0] for mode in ("ar", "orthrus")
    )
    assert len(ar.tokens) == new
    assert len(set(ar.tokens)) > 5, "a text of few tokens compares little"
    return ar.tokens, orthrus.tokens


def test_orthrus_equals_ar_after_3000_tokens() -> None:
    config = long_config(num_hidden_layers=2, max_position_embeddings=4096)
    prompt = ids_of(4, 1, 3000)[0].tolist()
    ar, orthrus = both_texts(config, prompt, 40)
    assert orthrus == ar
    other = both_texts(config, [(prompt[0] + 1) % 63, *prompt[1:]], 40)
    assert other[1] == other[0]


@pytest.mark.parametrize("agree", [0.8, *slow(0.0, 1.0)])
def test_drafts_are_accepted_and_rolled_back_after_long_prompts(agree: float) -> None:
    """Over many slots, with drafts that are right with probability `agree`."""
    config, new, lengths = long_config(num_key_value_heads=2), 30, [1100, 900, 5]
    model, slots = DraftedModel(config), 3 * KV_CHUNK
    prompts = ids_of(6, 3, 1104)
    params = {"model": random_params(config, 0, gain=2.5), "drafts": jnp.zeros((3, slots), int)}

    def decoded(loop: str):
        lengths_, budget = (jnp.asarray(x, jnp.int32) for x in (lengths, [new, new, 17]))
        static = {"slots": slots, "max_new_tokens": new}
        state = decoding.prefill(model, params, prompts, lengths_, budget, NO_EOS, **static)
        return jax.tree.map(np.asarray, LOOPS[loop](model, params, state))

    ar = decoded("ar")
    drafts = np.zeros((3, slots), np.int32)
    for row, length in enumerate(lengths):
        drafts[row, length : length + new] = ar.tokens[row]
    wrong = np.random.default_rng(7).random(drafts.shape) >= agree
    params["drafts"] = jnp.asarray(np.where(wrong, (drafts + 1) % 63, drafts))
    orthrus = decoded("orthrus")
    assert_same_decoding(ar, orthrus)
    rest = ar.count - 1
    least = -(-rest // config.block_size)
    assert (orthrus.cycles >= least).all()
    assert (orthrus.cycles <= rest).all()
    if agree in (0.0, 1.0):
        np.testing.assert_array_equal(orthrus.cycles, least if agree else rest)


def test_long_and_short_prompts_share_a_batch() -> None:
    config = long_config(max_position_embeddings=4096)
    model = LLM(config, random_params(config, 0, gain=2.5))
    prompts = [ids_of(seed, 1, n)[0].tolist() for seed, n in enumerate((3, 1200, 700, 40, 1100))]
    alone = [c.tokens for c in model.complete(prompts, strategy="ar", max_new_tokens=20)]
    for mode in ("ar", "orthrus"):
        completions = model.complete(prompts, strategy=mode, max_new_tokens=20, batch_size=2)
        assert [c.tokens for c in completions] == alone


@pytest.mark.slow
def test_orthrus_equals_ar_after_32000_tokens() -> None:
    config = long_config(max_position_embeddings=32_768 + 256)
    ar, orthrus = both_texts(config, ids_of(5, 1, 32_000)[0].tolist(), 40)
    assert orthrus == ar


# Memory


@functools.cache
def compiled_prefill(batch: int, padded: int, slots: int):
    ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    params = random_params(CONFIG, 0)
    arguments = (ids(batch, padded), ids(batch), ids(batch), ids(3))
    lowered = decoding.prefill.lower(
        Model(CONFIG), params, *arguments, slots=slots, max_new_tokens=64
    )
    return lowered.compile()


@functools.cache
def compiled_loop(loop: str, slots: int, *, batch: int = 1, groups: int = 2, block: int = 4):
    config = tiny_config(num_key_value_heads=groups, block_size=block)
    params, model = random_params(config, 0), Model(config)
    one = jnp.ones(batch, jnp.int32)
    state = jax.eval_shape(
        lambda: decoding.prefill(
            model, params, one[:, None], one, one, NO_EOS, slots=slots, max_new_tokens=64
        )
    )
    return LOOPS[loop].lower(model, params, state).compile()


def temporaries(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


@on_cpu
@pytest.mark.parametrize("batch", [1, *slow(2)])
def test_prefill_memory_does_not_grow_with_the_prompt(batch: int) -> None:
    slots = 16_384
    short, long = (temporaries(compiled_prefill(batch, padded, slots)) for padded in (2048, 8192))
    ids = 4 * batch * (8192 - 2048)
    assert long - short <= ids
    assert short < 2 * temporaries(compiled_prefill(batch, CHUNK, slots))


@on_cpu
@pytest.mark.parametrize("batch", [1, *slow(2)])
def test_memory_of_orthrus_beyond_ar_is_constant_in_the_context(batch: int) -> None:
    extra = [
        temporaries(compiled_loop("orthrus", slots, batch=batch))
        - temporaries(compiled_loop("ar", slots, batch=batch))
        for slots in (2048, 16_384)
    ]
    assert extra[0] == extra[1]
    assert 0 < extra[0] < 200_000
    for loop in LOOPS:  # no temporary is as long as the cache
        few, many = (
            temporaries(compiled_loop(loop, slots, batch=batch)) for slots in (2048, 16_384)
        )
        assert few == many


def copies_inside_loops(program: str, dims: tuple[int, ...]) -> list[str]:
    """HLO lines outside the entry that copy or transpose an array of these sizes, 1s aside."""
    without_ones = lambda dims: sorted(d for d in dims if d != 1)
    copies, computation = [], ""
    for line in program.splitlines():
        if line.endswith("{"):
            computation = line
        copy = re.search(r"= \w+\[([\d,]+)\]\S* (copy|copy-start|transpose)\(", line)
        if not copy or computation.startswith("ENTRY"):
            continue
        if without_ones(map(int, copy[1].split(","))) == without_ones(dims):
            copies.append(line.strip())
    return copies


@on_cpu
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(("batch", "groups", "block"), [(1, 1, 4), (1, 2, 2), (2, 2, 4)])
def test_loop_over_many_slots_copies_no_cache(loop, batch, groups, block) -> None:
    slots = 2048
    program = compiled_loop(loop, slots, batch=batch, groups=groups, block=block).as_text()
    assert " while(" in program
    assert re.search(rf"f32\[({batch},)?({groups},)?{slots},16\]", program)
    assert copies_inside_loops(program, (batch, groups, slots, 16)) == []


@on_cpu
@pytest.mark.parametrize("batch", [1, *slow(2)])
def test_chunked_prefill_copies_no_cache(batch: int) -> None:
    program = compiled_prefill(batch, 2048, 16_384).as_text()
    assert copies_inside_loops(program, (batch, 2, 16_384, 16)) == []


@on_cpu
def test_copy_inside_a_loop_is_detected() -> None:
    transpose = lambda i, x: jnp.sin(x).swapaxes(0, 1).reshape(x.shape)
    program = jax.jit(lambda n, x: jax.lax.fori_loop(0, n, transpose, x))
    text = program.lower(jnp.int32(3), jnp.zeros((16, 2048))).compile().as_text()
    assert copies_inside_loops(text, (16, 2048)) != []
