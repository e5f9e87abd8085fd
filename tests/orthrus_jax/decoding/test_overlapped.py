"""One forward a cycle: every path exactly on a scripted model, its bets, and what is left over."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.decoding import Strategy, no_draft, one_forward_decode, two_forward_decode
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
    return decode(model, params, state, Strategy("orthrus-1f", block_size, early_blocks=early))


def decode(model, params, state, strategy: Strategy, **options):
    """With no draft yet, if the state has none."""
    strategy = strategy.resolve(model.config)
    if state.drafter is None:
        state = state.replace(drafter=no_draft(strategy, state.count.shape[0]))
    return one_forward_decode(model, params, state, strategy=strategy, **options)


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
def test_accept_and_reject_paths_are_exact(name: str, early: int) -> None:
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


def test_one_forward_cycle_is_one_forward_and_emits() -> None:
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
    Strategy("orthrus-1f", K, early_blocks=2, fresh_blocks=3),
    Strategy("orthrus-1f", K, 6, early_blocks=3),
    Strategy("orthrus-1f", K, 9, early_blocks=10, fresh_blocks=2, candidates=4),
    Strategy("orthrus-1f", K, 2, early_blocks=1, candidates=2),
    Strategy("orthrus-1f", K, early_blocks=0, fresh_blocks=3),
    Strategy("orthrus-1f", 2, early_blocks=0, fresh_blocks=1, candidates=2),
    Strategy("orthrus-1f", K, 6, early_blocks=0, fresh_blocks=4),
    Strategy("orthrus-2f", K),
    Strategy("orthrus-2f", 2),
    Strategy("orthrus-2f", K, 6),
]


def name(strategy: Strategy) -> str:
    """A test's id."""
    blocks = f"{strategy.early_blocks or 0}+{strategy.fresh_blocks} of {strategy.draft_length}"
    return f"{strategy.method}, {strategy.tree_nodes} nodes, {blocks}"


def run_any(strategy: Strategy, text, drafts, lengths, budgets, eos=(), slots=SLOTS):
    state, params = start(
        MODEL, text, drafts, lengths, budgets, eos, slots=slots, lookahead=lookahead_of(strategy)
    )
    strategy = strategy.resolve(MODEL.config)
    if strategy.method == "orthrus-2f":
        return two_forward_decode(MODEL, params, state, strategy=strategy)
    state = state.replace(drafter=no_draft(strategy, len(lengths)))
    return one_forward_decode(MODEL, params, state, strategy=strategy)


def lookahead_of(strategy: Strategy) -> int:
    """Slots that the engine keeps free after an anchor."""
    return max(strategy.tree_nodes, K - 1)


def check_any(state, text, lengths, budgets, eos, room: list[int], cycle_emits: int) -> None:
    """Every row says its script as AR decoding does, and no cycle emits less than it must."""
    for row, (length, budget) in enumerate(zip(lengths, budgets, strict=True)):
        ar = expected(text[row], text[row], length, budget, eos, room=room[row], block_size=1)
        accepted = [n for n in np.asarray(state.accepted)[row].tolist() if n >= 0]
        check(state, row, text, Outcome(ar.tokens, accepted, ar.position))
        emitted, most = sum(n + cycle_emits for n in accepted), max(len(ar.tokens) - 1, 0)
        assert most <= emitted < most + cycle_emits + 1


@pytest.mark.parametrize("strategy", ANY, ids=name)
@pytest.mark.parametrize("name", PATHS)
def test_paths_are_exact_with_every_strategy(name: str, strategy: Strategy) -> None:
    _, _, budget, eos, *_ = PATHS[name]
    text, drafts = script_of(name)
    state = run_any(strategy, text, drafts, [5], [budget], eos)
    emits = strategy.forwards
    check_any(state, text, [5], [budget], eos, [N], emits)


@pytest.mark.parametrize("strategy", ANY, ids=name)
@pytest.mark.parametrize("slots", [SLOTS, 22])
def test_random_batches_are_exact_with_every_strategy(strategy: Strategy, slots: int) -> None:
    """Rows of every length, some of which meet the end of the cache."""
    rng = np.random.default_rng(slots)
    rows = 8
    text = plain_text(rows, WIDTH, seed=slots, low=5)
    drafts = drafts_agreeing(text, rng.random((rows, WIDTH)) < rng.uniform(0.3, 1, (rows, 1)))
    lengths, budgets = rng.integers(1, PROMPT + 1, rows).tolist(), [N, N, 3, N, 9, N, 1, 0]
    eos = tuple(rng.choice(61, 3, replace=False).tolist())
    state = run_any(strategy, text, drafts, lengths, budgets, eos, slots)
    room = [min(slots - lookahead_of(strategy) - length, N) for length in lengths]
    emits = strategy.forwards
    check_any(state, text, lengths, budgets, eos, room, emits)


@pytest.mark.parametrize("agree", [1.0, 0.5, 0.0])
def test_tree_of_all_candidates_is_always_accepted(agree: float) -> None:
    """Each token is one of the two likeliest guesses, and the tree holds both, everywhere."""
    text = plain_text(6, WIDTH, seed=2)
    drafts = drafts_agreeing(text, np.random.default_rng(1).random((6, WIDTH)) < agree)
    nodes = 2 + 4 + 8
    both = Strategy("orthrus-2f", K, nodes, candidates=2)
    state = run_any(both, text, drafts, [4] * 6, [16] * 6)
    assert np.asarray(state.accepted)[:, :4].tolist() == [[3, 3, 3, -1]] * 6
    both = Strategy("orthrus-1f", K, nodes, early_blocks=nodes + 1, candidates=2)
    state = run_any(both, text, drafts, [4] * 6, [14] * 6)
    assert np.asarray(state.accepted)[:, :5].tolist() == [[0, 3, 3, 3, -1]] * 6


@pytest.mark.parametrize(("fresh", "accepted"), [(0, [0, 1, 2]), (2, [0, 1, 3])])
def test_outcome_block_drafts_on_if_its_token_comes(fresh: int, accepted: list[int]) -> None:
    """At 8 the second guess is right. The early block bets on no draft standing, and is wrong.

    It was passed, and has a row less for what comes next. F(1, second) has a whole draft.
    """
    text = plain_text(1, WIDTH, seed=3)
    drafts = drafts_agreeing(text, np.arange(WIDTH) != 8)
    strategy = Strategy("orthrus-1f", K, early_blocks=1, fresh_blocks=fresh, candidates=2)
    state = run_any(strategy, text, drafts, [5], [12])
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
def test_outcome_blocks_without_length_blocks_draft_as_listed(
    fresh: int, wrong: list[int], accepted: list[int]
) -> None:
    """Bets go to (0, second), (1, second), (2, second), (3, first), in this order."""
    text = plain_text(1, WIDTH, seed=3)
    drafts = drafts_agreeing(text, ~np.isin(np.arange(WIDTH), wrong))
    strategy = Strategy("orthrus-1f", K, early_blocks=0, fresh_blocks=fresh, candidates=2)
    state = run_any(strategy, text, drafts, [5], [18])
    assert np.asarray(state.tokens)[0, :18].tolist() == text[0, 5:23].tolist()
    assert np.asarray(state.accepted)[0, : len(accepted)].tolist() == accepted


def test_both_forwards_of_a_two_forward_cycle_emit() -> None:
    text = plain_text(1, WIDTH, seed=3)
    never = drafts_agreeing(text, np.zeros_like(text, bool))
    scripted.forwards.clear()
    state, params = start(COUNTED, text, never, [5], [9])
    state = two_forward_decode(COUNTED, params, state, strategy=Strategy("orthrus-2f", K))
    jax.block_until_ready(state)
    jax.effects_barrier()
    assert scripted.forwards == ["ar", *["ar+diffusion", "ar"] * 4]
    assert np.asarray(state.accepted)[0, :5].tolist() == [0, 0, 0, 0, -1]


def test_draft_survives_a_pause() -> None:
    """Stopped after every cycle, the loop says the same in as many cycles."""
    text = plain_text(3, WIDTH, seed=5)
    drafts = drafts_agreeing(text, np.random.default_rng(6).random((3, WIDTH)) < 0.8)
    whole = run(MODEL, text, drafts, [4, 7, 9], [N] * 3, early=2)
    state, params = start(MODEL, text, drafts, [4, 7, 9], [N] * 3)
    for _ in range(N):
        state = decode(
            MODEL, params, state, Strategy("orthrus-1f", K, early_blocks=2), max_cycles=jnp.int32(1)
        )
    np.testing.assert_array_equal(state.tokens, whole.tokens)
    np.testing.assert_array_equal(state.accepted, whole.accepted)


@pytest.mark.parametrize(
    ("blocks", "early", "fresh"),
    [
        ({"early_blocks": K + 1}, K, 0),
        ({"early_blocks": 1, "fresh_blocks": 99, "candidates": 2}, 1, 2 * K),
        ({"early_blocks": 99, "tree_nodes": 6}, 7, 0),
        ({}, K, 0),
        ({"fresh_blocks": 3}, K, 3),
        ({"early_blocks": 0, "fresh_blocks": 3}, 0, 3),
    ],
)
def test_strategy_resolves_to_blocks_that_a_draft_can_use(blocks, early: int, fresh: int) -> None:
    strategy = Strategy("orthrus-1f", K, **blocks).resolve(MODEL.config)
    assert (strategy.early_blocks, strategy.fresh_blocks) == (early, fresh)
    assert strategy.resolve(MODEL.config) == strategy


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("half", "method='half' is not one of ar, orthrus, orthrus-2f, orthrus-1f"),
        (Strategy("orthrus-1f", early_blocks=0), "early_blocks=0 and .* at least one"),
        (
            Strategy("orthrus-1f", early_blocks=0, fresh_blocks=-1),
            "fresh_blocks=-1 must be 0 or more",
        ),
        (Strategy(tree_nodes=8), "tree_nodes=8 needs method='orthrus-2f' or 'orthrus-1f'"),
        (Strategy("ar", tree_nodes=8), "tree_nodes=8 needs method="),
        (Strategy("orthrus-2f", early_blocks=3), "early_blocks=3 needs method='orthrus-1f'"),
        (Strategy(accept="always"), "accept='always' is not one of rejection, coupled"),
        (Strategy("orthrus-1f", draft_temperature=-1.0), "draft_temperature=-1.0 must be above 0"),
    ],
)
def test_strategy_that_cannot_be_is_refused(strategy, message) -> None:
    with pytest.raises(UserError, match=message):
        LLM(tiny_config(), {}).complete([[1, 2]], strategy=strategy)


def test_drafting_without_a_mask_token_is_refused() -> None:
    model = scripted.ScriptedModel(tiny_config(block_size=K, mask_token_id=None))
    text = plain_text(1, WIDTH)
    with pytest.raises(UserError, match="mask_token_id"):
        run(model, text, text, [3], [3], early=1)
