"""The decoding loops on a scripted model: each accept, reject, stop and rollback path, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import decoding
from orthrus_jax.decoding.sampling import accept_equal, greedy
from orthrus_jax.errors import UserError
from tests.support.configs import tiny_config
from tests.support.decoding import (
    COUNTED,
    MODEL,
    PATHS,
    PROMPT,
    SLOTS,
    WIDTH,
    K,
    N,
    check,
    orthrus_decode,
    script_of,
    start,
)
from tests.support.fake_models import scripted
from tests.support.fake_models.scripted import (
    VOCAB,
    ScriptedModel,
    drafts_agreeing,
    expected,
    plain_text,
)


def run(loop, model, *args, block_size=None, **kwargs):
    state, params = start(model, *args, **kwargs)
    if loop == "ar":
        return decoding.ar_decode(model, params, state)
    return orthrus_decode(model, params, state, block_size=block_size)


def check_all(loop, model, text, drafts, lengths, budgets, eos=(), *, block_size=K, **kwargs):
    """Run a batch and compare every row with the plain-Python loop."""
    size = None if block_size == K else block_size
    state = run(loop, model, text, drafts, lengths, budgets, eos, block_size=size, **kwargs)
    capacity = kwargs.get("slots", SLOTS) - (K - 1)
    for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        outcome = expected(
            text[row],
            drafts[row],
            length,
            budget,
            eos,
            room=min(capacity - length, kwargs.get("new", N)),
            block_size=1 if loop == "ar" else block_size,
        )
        check(state, row, text, outcome)
    return state


@pytest.mark.parametrize("name", PATHS)
def test_accept_and_reject_paths_are_exact(name: str) -> None:
    _, _, budget, eos, emitted, accepted = PATHS[name]
    (text, drafts), length = script_of(name), 5
    outcome = scripted.Outcome(
        text[0, length : length + emitted].tolist(), accepted, length - 1 + emitted
    )
    check(run("orthrus", COUNTED, text, drafts, [length], [budget], eos), 0, text, outcome)
    steps = max(emitted - 1, 0)
    ar = scripted.Outcome(outcome.tokens, [0] * steps, outcome.position)
    check(run("ar", COUNTED, text, drafts, [length], [budget], eos), 0, text, ar)


@pytest.mark.parametrize("name", PATHS)
def test_forwards_are_one_and_two_a_cycle(name: str) -> None:
    _, _, budget, eos, _, accepted = PATHS[name]
    text, drafts = script_of(name)
    scripted.forwards.clear()
    state = jax.block_until_ready(run("orthrus", COUNTED, text, drafts, [5], [budget], eos))
    jax.effects_barrier()
    cycles = int(state.cycles[0])
    assert cycles == len(accepted)
    assert len(scripted.forwards) == 1 + 2 * cycles
    assert scripted.forwards.count("diffusion") == cycles

    scripted.forwards.clear()
    state = jax.block_until_ready(run("ar", COUNTED, text, drafts, [5], [budget], eos))
    jax.effects_barrier()
    assert scripted.forwards == ["ar"] * (1 + int(state.cycles[0]))


@pytest.mark.parametrize("loop", ["ar", "orthrus"])
@pytest.mark.parametrize("agree", [0.0, 0.5, 0.8, 1.0])
def test_prompts_of_every_length_in_one_batch(loop: str, agree: float) -> None:
    """Lengths 1 ... 12: every remainder of K. Rows accept different counts and finish apart."""
    rows = PROMPT
    text = plain_text(rows, WIDTH, seed=2)
    drafts = drafts_agreeing(text, np.random.default_rng(3).random((rows, WIDTH)) < agree)
    lengths, budgets = list(range(1, rows + 1)), [N, 3, 0, 1, 7, 20, 13, 2, 0, 19, 5, 4]
    state = check_all(loop, MODEL, text, drafts, lengths, budgets)
    assert np.asarray(state.count).tolist() == budgets
    assert len(set(np.asarray(state.cycles).tolist())) > 2


@pytest.mark.parametrize("seed", range(6))
def test_random_batches_with_random_eos_are_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 8
    text = plain_text(rows, WIDTH, seed=seed, low=0 if seed % 2 else 8)
    drafts = drafts_agreeing(text, rng.random((rows, WIDTH)) < rng.uniform(0.3, 1, (rows, 1)))
    lengths = rng.integers(1, PROMPT + 1, rows).tolist()
    budgets = rng.integers(0, N + 5, rows).tolist()
    eos = tuple(rng.choice(61, 3, replace=False).tolist())
    parallel = check_all("orthrus", MODEL, text, drafts, lengths, budgets, eos)
    ar = check_all("ar", MODEL, text, drafts, lengths, budgets, eos)
    np.testing.assert_array_equal(parallel.count, ar.count)


@pytest.mark.parametrize("loop", ["ar", "orthrus"])
@pytest.mark.parametrize("agree", [0.0, 0.7, 1.0])
def test_sequence_is_cut_where_the_cache_ends(loop: str, agree: float) -> None:
    """Every prompt length up to the padded 12 in 18 slots: capacity 15, whatever is accepted."""
    slots, rows = 18, PROMPT
    text = plain_text(rows, WIDTH, seed=4)
    drafts = drafts_agreeing(text, np.random.default_rng(5).random((rows, WIDTH)) < agree)
    lengths = list(range(1, rows + 1))
    assert decoding.capacity(slots, K - 1) == 15
    state = check_all(loop, MODEL, text, drafts, lengths, [99] * rows, slots=slots)
    assert np.asarray(state.count).tolist() == [15 - length for length in lengths]


@pytest.mark.parametrize("loop", ["ar", "orthrus"])
def test_prompt_that_fills_the_capacity_is_done_at_once(loop: str) -> None:
    text = plain_text(4, WIDTH, seed=6)
    lengths = [9, 10, 11, 12]  # of 12 slots: capacity 9
    state = check_all(loop, MODEL, text, text, lengths, [9] * 4, slots=12)
    assert np.asarray(state.count).tolist() == [0, 0, 0, 0]
    assert np.asarray(state.cycles).tolist() == [0, 0, 0, 0]


def test_output_width_cuts_a_larger_budget() -> None:
    text = plain_text(2, WIDTH, seed=7)
    state = check_all("orthrus", MODEL, text, text, [3, 4], [99, 6], new=10)
    assert np.asarray(state.count).tolist() == [10, 6]


@pytest.mark.parametrize("block_size", [2, 3, 4])
@pytest.mark.parametrize("agree", [0.0, 0.6, 1.0])
def test_block_shorter_than_the_trained_one_is_exact(block_size: int, agree: float) -> None:
    text = plain_text(5, WIDTH, seed=8)
    text[3, 14] = 1
    drafts = drafts_agreeing(text, np.random.default_rng(9).random((5, WIDTH)) < agree)
    args = (text, drafts, [1, 4, 6, 9, 12], [20, 11, 5, 20, 1], (1,))
    state = check_all("orthrus", MODEL, *args, block_size=block_size)
    most = int(state.accepted.max())
    assert most == {0.0: 0, 1.0: block_size - 1}.get(agree, most)
    assert most < block_size
    check_all("orthrus", MODEL, *args, block_size=block_size, slots=18)


def test_finished_sequence_keeps_its_state_while_others_go_on() -> None:
    text = plain_text(3, WIDTH, seed=10)
    text[0, 5] = 1  # done at its first token
    text[1, 8] = 1
    drafts = drafts_agreeing(text, np.zeros_like(text, bool))
    state = check_all("orthrus", MODEL, text, drafts, [5, 5, 5], [20, 20, 20], (1,))
    assert np.asarray(state.cycles).tolist() == [0, 3, 19]


def test_batch_of_fillers_runs_no_cycle() -> None:
    text = plain_text(2, WIDTH)
    scripted.forwards.clear()
    state = jax.block_until_ready(run("orthrus", COUNTED, text, text, [1, 3], [0, 0]))
    jax.effects_barrier()
    assert scripted.forwards == ["ar"]
    assert np.asarray(state.count).tolist() == [0, 0]
    assert np.asarray(state.done).all()


def test_batch_runs_as_many_cycles_as_its_slowest_sequence() -> None:
    text = plain_text(2, WIDTH, seed=11)
    drafts = drafts_agreeing(text, np.array([[True], [False]]))
    scripted.forwards.clear()
    state = jax.block_until_ready(run("orthrus", COUNTED, text, drafts, [4, 4], [9, 9]))
    jax.effects_barrier()
    assert np.asarray(state.cycles).tolist() == [2, 8]
    assert len(scripted.forwards) == 1 + 2 * 8


def test_second_call_on_a_finished_state_changes_nothing() -> None:
    text = plain_text(1, WIDTH, seed=12)
    state, params = start(MODEL, text, text, [5], [9])
    state = orthrus_decode(MODEL, params, state)
    before = jax.tree.map(np.asarray, state)
    after = orthrus_decode(MODEL, params, state)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, after))


def test_accept_takes_the_longest_agreeing_prefix_and_one_token_more() -> None:
    """The worked arrays of its docstring, and their neighbours."""
    text = plain_text(4, WIDTH, seed=13)
    state, _ = start(MODEL, text, text, [5] * 4, [20] * 4)
    first = np.asarray(state.tokens)[:, 0]
    drafts = jnp.array([[7, 3, 9, 4], [7, 3, 5, 8], [1, 3, 5, 8], [7, 3, 5, 9]])
    predicted = jnp.array([[7, 3, 5, 8, 2]] * 4)
    verdict = accept_equal(drafts, predicted)
    state, kept = decoding.accept(state, verdict, jnp.zeros((4, 5, VOCAB)))
    assert kept.tolist() == [2, 4, 0, 3]
    assert np.asarray(state.accepted)[:, 0].tolist() == [2, 4, 0, 3]
    assert np.asarray(state.count).tolist() == [4, 6, 2, 5]
    assert np.asarray(state.tokens)[0, :4].tolist() == [first[0], 7, 3, 5]
    assert np.asarray(state.anchor).tolist() == [5, 2, 7, 8]
    assert np.asarray(state.position).tolist() == [8, 10, 6, 9]


def test_ties_go_to_the_first_id_as_argmax_has_it() -> None:
    logits = jnp.asarray(np.random.default_rng(0).integers(0, 4, (3, 5, 17)), jnp.float32)
    tokens = greedy(logits)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, np.asarray(logits).argmax(-1))


def test_prompt_wider_than_the_cache_is_refused() -> None:
    text = plain_text(1, WIDTH)
    with pytest.raises(ValueError, match="padded to 12 rows does not fit 11 cache slots"):
        start(MODEL, text, text, [3], [3], slots=11)


def test_drafting_without_a_mask_token_is_refused() -> None:
    model = ScriptedModel(tiny_config(block_size=K, mask_token_id=None))
    text = plain_text(1, WIDTH)
    with pytest.raises(UserError, match="mask_token_id"):
        run("orthrus", model, text, text, [3], [3])
