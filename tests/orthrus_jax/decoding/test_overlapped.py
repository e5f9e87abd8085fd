"""One forward a cycle: every path exactly on a scripted model, its bets, and what is left over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.decoding import overlapped as ahead
from orthrus_jax.decoding.overlapped import Scheme
from orthrus_jax.decoding.sampling import Proposal
from orthrus_jax.engine import Plan, Request, SamplingParams
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
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
    script_of,
    start,
)
from tests.support.fake_models import scripted
from tests.support.fake_models.scripted import (
    Outcome,
    drafts_agreeing,
    expected,
    expected_ahead,
    plain_text,
)


def run(model, *args, early: int, block_size: int = K, **kwargs):
    state, params = start(model, *args, **kwargs)
    return decode(model, params, state, Scheme(block_size, early=early))


def decode(model, params, state, scheme: Scheme, **options):
    """With no draft yet, if the state has none."""
    if state.ahead is None:
        state = state.replace(ahead=scheme.nothing(state.count.shape[0]))
    return ahead.one_forward_decode(model, params, state, scheme=scheme, **options)


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


ANY = [
    (ahead.one_forward_decode, Scheme(K, early=2, fresh=3)),
    (ahead.one_forward_decode, Scheme(K, nodes=6, early=3)),
    (ahead.one_forward_decode, Scheme(K, nodes=9, early=10, fresh=2, choices=4)),
    (ahead.one_forward_decode, Scheme(K, nodes=2, early=1, choices=2)),
    (ahead.one_forward_decode, Scheme(K, fresh=3)),
    (ahead.one_forward_decode, Scheme(2, fresh=1, choices=2)),
    (ahead.one_forward_decode, Scheme(K, nodes=6, fresh=4)),
    (ahead.two_forward_decode, Scheme(K)),
    (ahead.two_forward_decode, Scheme(2)),
    (ahead.two_forward_decode, Scheme(K, nodes=6)),
]
NAMES = [
    f"{loop.__name__}, {s.nodes} nodes, {s.early}+{s.fresh} of {s.block_size}" for loop, s in ANY
]


def run_any(loop, scheme: Scheme, text, drafts, lengths, budgets, eos=(), slots=SLOTS):
    state, params = start(
        MODEL, text, drafts, lengths, budgets, eos, slots=slots, reach=max(scheme.drafts, K - 1)
    )
    if loop is ahead.one_forward_decode:
        state = state.replace(ahead=scheme.nothing(len(lengths)))
    return loop(MODEL, params, state, scheme=scheme)


def check_any(state, text, lengths, budgets, eos, room: list[int], cycle_emits: int) -> None:
    """Every row says its script as AR decoding does, and no cycle emits less than it must."""
    for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        ar = expected(text[row], text[row], length, budget, eos, room=room[row], block_size=1)
        accepted = [n for n in np.asarray(state.accepted)[row].tolist() if n >= 0]
        check(state, row, text, Outcome(ar.tokens, accepted, ar.position))
        emitted, most = sum(n + cycle_emits for n in accepted), max(len(ar.tokens) - 1, 0)
        assert most <= emitted < most + cycle_emits + 1


@pytest.mark.parametrize(("loop", "scheme"), ANY, ids=NAMES)
@pytest.mark.parametrize("name", PATHS)
def test_every_path_is_exact_whatever_is_drafted(name: str, loop, scheme: Scheme) -> None:
    _, _, budget, eos, *_ = PATHS[name]
    text, drafts = script_of(name)
    state = run_any(loop, scheme, text, drafts, [5], [budget], eos)
    emits = 2 if loop is ahead.two_forward_decode else 1
    check_any(state, text, [5], [budget], eos, [N], emits)


@pytest.mark.parametrize(("loop", "scheme"), ANY, ids=NAMES)
@pytest.mark.parametrize("slots", [SLOTS, 22])
def test_random_batches_are_exact_whatever_is_drafted(loop, scheme: Scheme, slots: int) -> None:
    """Rows of every length, some of which meet the end of the cache."""
    rng = np.random.default_rng(slots)
    rows = 8
    text = plain_text(rows, WIDTH, seed=slots, low=5)
    drafts = drafts_agreeing(text, rng.random((rows, WIDTH)) < rng.uniform(0.3, 1, (rows, 1)))
    lengths, budgets = rng.integers(1, PROMPT + 1, rows).tolist(), [N, N, 3, N, 9, N, 1, 0]
    eos = tuple(rng.choice(61, 3, replace=False).tolist())
    state = run_any(loop, scheme, text, drafts, lengths, budgets, eos, slots)
    reach = max(scheme.drafts, K - 1)
    room = [min(slots - reach - length, N) for length in lengths]
    emits = 2 if loop is ahead.two_forward_decode else 1
    check_any(state, text, lengths, budgets, eos, room, emits)


@pytest.mark.parametrize("agree", [1.0, 0.5, 0.0])
def test_a_tree_of_all_the_drafter_s_choices_is_always_right(agree: float) -> None:
    """Each token is one of the two likeliest guesses, and the tree holds both, everywhere."""
    text = plain_text(6, WIDTH, seed=2)
    drafts = drafts_agreeing(text, np.random.default_rng(1).random((6, WIDTH)) < agree)
    nodes = 2 + 4 + 8
    both = Scheme(K, nodes=nodes, choices=2)
    state = run_any(ahead.two_forward_decode, both, text, drafts, [4] * 6, [16] * 6)
    assert np.asarray(state.accepted)[:, :4].tolist() == [[3, 3, 3, -1]] * 6
    both = Scheme(K, nodes=nodes, early=nodes + 1, choices=2)
    state = run_any(ahead.one_forward_decode, both, text, drafts, [4] * 6, [14] * 6)
    assert np.asarray(state.accepted)[:, :5].tolist() == [[0, 3, 3, 3, -1]] * 6


@pytest.mark.parametrize(("fresh", "accepted"), [(0, [0, 1, 2]), (2, [0, 1, 3])])
def test_a_fresh_block_drafts_on_where_its_token_comes(fresh: int, accepted: list[int]) -> None:
    """At 8 the second guess is right. The early block bets on no draft standing, and is wrong.

    It was passed, and has a row less for what comes next. F(1, second) has a whole draft.
    """
    text = plain_text(1, WIDTH, seed=3)
    drafts = drafts_agreeing(text, np.arange(WIDTH) != 8)
    scheme = Scheme(K, early=1, fresh=fresh, choices=2)
    state = run_any(ahead.one_forward_decode, scheme, text, drafts, [5], [12])
    assert np.asarray(state.tokens)[0, :12].tolist() == text[0, 5:17].tolist()
    assert np.asarray(state.accepted)[0, :3].tolist() == accepted


@pytest.mark.parametrize(
    ("fresh", "wrong", "accepted"),
    [
        (1, [], [0, 3, 0, 3, 0, 3]),  # no bet on three standing: nothing is left, E(0) begins anew
        (1, [8], [0, 1, 1, 0, 3]),  # 8 comes, and was not bet on: what is left, then E(0)
        (1, [8, 9], [0, 1, 0, 3]),  # what is left is wrong at once, and that was bet on
        (3, [7], [0, 0, 3, 0, 3]),  # F(0, second) has a whole draft; F(3, first) is not run
        (4, [7], [0, 0, 3, 3, 3, 3]),  # is run: whole drafts one behind the other
    ],
)
def test_fresh_blocks_alone(fresh: int, wrong: list[int], accepted: list[int]) -> None:
    """Bets go to (0, second), (1, second), (2, second), (3, first), in this order."""
    text = plain_text(1, WIDTH, seed=3)
    drafts = drafts_agreeing(text, ~np.isin(np.arange(WIDTH), wrong))
    scheme = Scheme(K, fresh=fresh, choices=2)
    state = run_any(ahead.one_forward_decode, scheme, text, drafts, [5], [18])
    assert np.asarray(state.tokens)[0, :18].tolist() == text[0, 5:23].tolist()
    assert np.asarray(state.accepted)[0, : len(accepted)].tolist() == accepted


def test_each_forward_of_two_emits() -> None:
    text = plain_text(1, WIDTH, seed=3)
    never = drafts_agreeing(text, np.zeros_like(text, bool))
    scripted.forwards.clear()
    state, params = start(COUNTED, text, never, [5], [9])
    state = ahead.two_forward_decode(COUNTED, params, state, scheme=Scheme(K))
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert scripted.forwards == ["ar", *["ar+diffusion", "ar"] * 4]
    assert np.asarray(state.accepted)[0, :5].tolist() == [0, 0, 0, 0, -1]


def test_a_draft_goes_on_behind_a_pause() -> None:
    """Stopped after every cycle, the loop says the same in as many cycles."""
    text = plain_text(3, WIDTH, seed=5)
    drafts = drafts_agreeing(text, np.random.default_rng(6).random((3, WIDTH)) < 0.8)
    whole = run(MODEL, text, drafts, [4, 7, 9], [N] * 3, early=2)
    state, params = start(MODEL, text, drafts, [4, 7, 9], [N] * 3)
    for _ in range(N):
        state = decode(MODEL, params, state, Scheme(K, early=2), cycles=jnp.int32(1))
    np.testing.assert_array_equal(state.tokens, whole.tokens)
    np.testing.assert_array_equal(state.accepted, whole.accepted)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({}, "early=0 and fresh=0"),
        ({"early": K + 1}, "early=5 must be from 0 to 4, the ends"),
        ({"early": 1, "fresh": 9, "choices": 2}, "fresh=9 must be from 0 to 8, the pairs"),
    ],
)
def test_no_block_or_more_than_there_are_bets_is_refused(blocks: dict, message: str) -> None:
    text = plain_text(1, WIDTH)
    state, params = start(MODEL, text, text, [3], [3])
    with pytest.raises(ValueError, match=message):
        decode(MODEL, params, state, Scheme(K, **blocks))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycle": "half"}, "cycle='half' is not one of paper, two-forward, one-forward"),
        ({"cycle": "one-forward", "early_blocks": 0}, "early_blocks=0 and .* at least one"),
        ({"cycle": "one-forward", "fresh_blocks": -1}, "fresh_blocks=-1 must be 0 or more"),
        ({"cycle": "paper", "tree_nodes": 8}, "tree_nodes=8 needs cycle='two-forward' or"),
    ],
)
def test_an_impossible_cycle_is_refused(options, message) -> None:
    with pytest.raises(UserError, match=message):
        LLM(tiny_config(), {}).complete([[1, 2]], **options)


def test_a_draw_from_q_is_not_drafted_ahead() -> None:
    engine = LLM(tiny_config(), {}).engine
    plan = Plan(cycle="one-forward", proposal=Proposal.DRAW)
    with pytest.raises(UserError, match="proposal=draw needs cycle='paper'"):
        engine.check([Request([1], SamplingParams(temperature=1.0))], plan)


def test_drafting_ahead_without_a_mask_token_is_refused() -> None:
    model = scripted.ScriptedModel(tiny_config(block_size=K, mask_token_id=None))
    text = plain_text(1, WIDTH)
    with pytest.raises(AssertionError, match="mask_token_id"):
        run(model, text, text, [3], [3], early=1)
