"""One forward a cycle: every path exactly on a scripted model, its bets, and what is left over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import ahead
from orthrus_jax.engine import Plan, Request
from orthrus_jax.errors import UserError
from orthrus_jax.generate import Generator
from orthrus_jax.sampling import Proposal, SamplingParams
from tests import scripted
from tests.helpers import tiny_config
from tests.orthrus_jax.test_decode import (
    COUNTED,
    MODEL,
    PATHS,
    PROMPT,
    SLOTS,
    WIDTH,
    K,
    N,
    check,
    script_of,
    start,
)
from tests.scripted import drafts_agreeing, expected_ahead, plain_text


def run(model, *args, early: int, block_size: int = K, **kwargs):
    state, params = start(model, *args, **kwargs)
    state = state.replace(ahead=ahead.nothing(state.count.shape[0], block_size))
    return ahead.one_forward_decode(model, params, state, block_size=block_size, early=early)


def check_all(model, text, drafts, lengths, budgets, eos=(), *, early, block_size=K, slots=SLOTS):
    """Run a batch and compare every row with the loop in plain Python."""
    args = (model, text, drafts, lengths, budgets, eos)
    state = run(*args, early=early, block_size=block_size, slots=slots)
    for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        room = min(slots - (K - 1) - length, N)
        outcome = expected_ahead(
            text[row], drafts[row], length, budget, eos,
            room=room, block_size=block_size, early=early,
        )  # fmt: skip
        check(state, row, text, outcome)
    return state


@pytest.mark.parametrize("early", [1, 2, K])
@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_exact(name: str, early: int) -> None:
    _, _, budget, eos, emitted, _ = PATHS[name]
    text, drafts = script_of(name)
    state = check_all(MODEL, text, drafts, [5], [budget], eos, early=early)
    assert np.asarray(state.tokens)[0, :emitted].tolist() == text[0, 5 : 5 + emitted].tolist()


@pytest.mark.parametrize("early", [1, 3, K])
@pytest.mark.parametrize("seed", range(4))
def test_random_batches_are_exact(seed: int, early: int) -> None:
    rng = np.random.default_rng(seed)
    rows = 8
    text = plain_text(rows, WIDTH, seed=seed, low=0 if seed % 2 else 8)
    drafts = drafts_agreeing(text, rng.random((rows, WIDTH)) < rng.uniform(0.3, 1, (rows, 1)))
    lengths = rng.integers(1, PROMPT + 1, rows).tolist()
    budgets = rng.integers(0, N + 5, rows).tolist()
    eos = tuple(rng.choice(61, 3, replace=False).tolist())
    check_all(MODEL, text, drafts, lengths, budgets, eos, early=early)


@pytest.mark.parametrize(("slots", "block_size"), [(18, K), (18, 2), (SLOTS, 3)])
def test_short_blocks_and_the_end_of_the_cache(slots: int, block_size: int) -> None:
    text = plain_text(5, WIDTH, seed=8)
    drafts = drafts_agreeing(text, np.random.default_rng(9).random((5, WIDTH)) < 0.7)
    lengths, budgets = [1, 4, 6, 9, 12], [20, 11, 5, 20, 1]
    args = (MODEL, text, drafts, lengths, budgets)
    check_all(*args, early=2, block_size=block_size, slots=slots)


def test_each_cycle_is_one_forward_and_emits() -> None:
    text = plain_text(1, WIDTH, seed=3)
    scripted.forwards.clear()
    state = jax.block_until_ready(run(COUNTED, text, text, [5], [N], early=2))
    jax.effects_barrier()
    cycles = int(state.cycles[0])
    assert scripted.forwards == ["ar", *["ar+diffusion"] * cycles]
    assert (np.asarray(state.accepted)[0, :cycles] >= 0).all()
    never = drafts_agreeing(text, np.zeros_like(text, bool))
    state = run(MODEL, text, never, [5], [N], early=2)
    assert int(state.cycles[0]) == N - 1, "as many as AR decoding takes, and no more"


def test_a_draft_goes_on_behind_a_pause() -> None:
    """Stopped after every cycle, the loop says the same in as many cycles."""
    text = plain_text(3, WIDTH, seed=5)
    drafts = drafts_agreeing(text, np.random.default_rng(6).random((3, WIDTH)) < 0.8)
    whole = run(MODEL, text, drafts, [4, 7, 9], [N] * 3, early=2)
    state, params = start(MODEL, text, drafts, [4, 7, 9], [N] * 3)
    state = state.replace(ahead=ahead.nothing(3, K))
    for _ in range(N):
        state = ahead.one_forward_decode(MODEL, params, state, early=2, cycles=jnp.int32(1))
    np.testing.assert_array_equal(state.tokens, whole.tokens)
    np.testing.assert_array_equal(state.accepted, whole.accepted)


def test_the_likeliest_ends_are_bet_on() -> None:
    trust = np.random.default_rng(0).random((50, 5)).astype(np.float32)
    bets = np.asarray(ahead.likeliest_ends(jnp.asarray(trust), 3))
    for row, found in zip(trust, bets, strict=True):
        ends = [np.prod(row[:n]) * (1 - row[n] if n < 5 else 1) for n in range(6)]
        assert sum(ends) == pytest.approx(1, abs=1e-5)
        assert sorted(found) == sorted(np.argsort(ends)[-3:])


def test_a_new_draft_is_all_before_it_has_begun() -> None:
    bets = ahead.likeliest_ends(ahead.nothing(2, K).trust, 1)
    assert np.asarray(bets).tolist() == [[0], [0]]


def test_what_is_left_of_a_draft_moves_up() -> None:
    old = ahead.Ahead(jnp.array([[1, 2, 3, 4]] * 4), jnp.array([[0.9, 0.8, 0.7, 0.6]] * 4))
    left = ahead.leftover(old, jnp.array([0, 1, 3, 4]))
    assert np.asarray(left.tokens).tolist() == [
        [2, 3, 4, 4], [3, 4, 4, 4], [4, 4, 4, 4], [4, 4, 4, 4],
    ]  # fmt: skip
    assert (np.asarray(left.trust) > 0).sum(1).tolist() == [3, 2, 0, 0]


@pytest.mark.parametrize("early", [0, K + 1])
def test_more_blocks_than_ends_are_refused(early: int) -> None:
    text = plain_text(1, WIDTH)
    with pytest.raises(ValueError, match=f"early={early} must be from 1 to block_size=4"):
        run(MODEL, text, text, [3], [3], early=early)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycle": "half"}, "cycle='half' is not one of two-forward, one-forward"),
        ({"cycle": "one-forward", "early_blocks": 0}, "early_blocks=0 must be at least 1"),
    ],
)
def test_an_impossible_cycle_is_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        Generator(tiny_config(), {}).complete([[1, 2]], **options)


def test_a_draw_from_q_is_not_drafted_ahead() -> None:
    engine = Generator(tiny_config(), {}).engine
    plan = Plan(cycle="one-forward", proposal=Proposal.DRAW)
    with pytest.raises(UserError, match="proposal=draw needs cycle='two-forward'"):
        engine.check([Request([1], SamplingParams(temperature=1.0))], plan)


def test_drafting_ahead_without_a_mask_token_is_refused() -> None:
    model = scripted.ScriptedModel(tiny_config(block_size=K, mask_token_id=None))
    text = plain_text(1, WIDTH)
    with pytest.raises(AssertionError, match="mask_token_id"):
        run(model, text, text, [3], [3], early=1)
