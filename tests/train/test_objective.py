"""The objective against a plain reference that runs every block alone, and its properties."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, Segment, View, params
from tests.support.training import (
    CONFIG,
    LENGTH,
    VOCAB,
    K,
    made_dialogues,
    made_rows,
    random_trees,
)
from train import objective
from train.data import TokenizedDialogue, pack, stack
from train.divergence import Divergence, RowScores, head_of, score_against_teacher
from train.objective import Blocks, Objective, distillation_loss, sample_blocks

draw_blocks = jax.jit(sample_blocks, static_argnums=(2, 3))
total_loss = jax.jit(distillation_loss, static_argnums=(2, 5))


def mean_loss(diffusion, frozen, model, rows, key, aim):
    """The mean loss that a step minimises."""
    blocks = sample_blocks(key, rows, aim.anchors, K)
    total, sums = distillation_loss(diffusion, frozen, model, rows, blocks, aim)
    return total / sums.weight


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0, 0))
def log_laws(model, tree, document, block, at):
    """log p and log q [K, V] of one block [K] at `at` of one document [LENGTH], each run alone."""
    clean = Segment(document[None], jnp.arange(LENGTH)[None], View.AR)
    masked = Segment(block[None], at + jnp.arange(K)[None], View.DIFFUSION, block=K)
    (teacher, student), _ = model.forward(tree, [clean, masked], None)
    of = lambda hidden: jax.nn.log_softmax(model.logits(tree, hidden))
    return of(jax.lax.dynamic_slice_in_dim(teacher[0], at, K)), of(student[0])


def reference_loss(diffusion, frozen, model, rows, blocks, loss_of, gamma=None):
    """Mean over supervised rows: each document cut out, each block run alone, dense softmax."""
    pairs = list(np.ndindex(blocks.anchors.shape))
    documents = np.zeros((len(pairs), LENGTH), np.int32)
    masked = np.full((len(pairs), K), CONFIG.mask_token_id, np.int32)
    at = np.zeros(len(pairs), np.int32)
    for n, (b, i) in enumerate(pairs):
        anchor = int(blocks.anchors[b, i])
        first = int(rows.start[b, anchor])
        cut = rows.tokens[
            b, first : anchor + K
        ]  # no token after the block, none of another document
        documents[n, : len(cut)] = cut
        masked[n, 0], at[n] = rows.tokens[b, anchor], anchor - first
    log_p, log_q = log_laws(model, params.merge(frozen, diffusion), documents, masked, at)
    on = np.asarray(blocks.supervised).reshape(len(pairs), K)
    weights = np.ones(K) if gamma is None else np.exp(-np.arange(K) / gamma)
    losses = jax.vmap(jax.vmap(loss_of))(log_p, log_q)
    return (on * weights * losses).sum() / (on * weights).sum()


LOSSES = {
    Divergence.KL: lambda p, q: (jnp.exp(p) * (p - q)).sum(),
    Divergence.TV: lambda p, q: jnp.abs(jnp.exp(p) - jnp.exp(q)).sum() / 2,
    Divergence.CE: lambda p, q: -q[p.argmax()],
}


@pytest.mark.parametrize(
    ("seed", "turns", "tied", "aim", "remat", "stacked"),
    [
        (0, 1, True, Objective(5), "none", False),
        pytest.param(1, 1, False, Objective(5), "none", True, marks=pytest.mark.slow),
        (2, 2, True, Objective(6, gamma=2.0), "full", True),
        (3, 3, False, Objective(4, Divergence.TV), "dots", False),
        (4, 1, True, Objective(5, Divergence.CE, gamma=1.5), "dots", True),
    ],
)
def test_loss_and_gradient_equal_the_dense_reference(seed, turns, tied, aim, remat, stacked):
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    plain, frozen, diffusion = random_trees(seed, config)
    model = Model(config, remat=remat)
    rows, key = made_rows(seed, turns=turns), jax.random.key(seed)
    blocks = draw_blocks(key, rows, aim.anchors, K)
    assert 10 < int(blocks.supervised.sum()) < blocks.supervised.size  # some rows are not trained

    shape = params.stack if stacked else lambda tree: tree
    loss = lambda d: mean_loss(d, shape(frozen), model, rows, key, aim)
    value, gradient = jax.jit(jax.value_and_grad(loss))(shape(diffusion))
    with jax.default_matmul_precision("highest"):
        expected, reference = jax.value_and_grad(reference_loss)(
            diffusion, frozen, plain, rows, blocks, LOSSES[aim.divergence], aim.gamma
        )
    assert float(expected) > 0.1
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for ours, theirs in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(shape(reference)), strict=True
    ):
        scale = np.abs(theirs).max()
        assert scale > 0
        assert np.abs(ours - theirs).max() <= 1e-5 * scale


def test_anchors_are_distinct_answer_tokens_with_room_for_a_block():
    rows = made_rows(rows=4)
    seen = set()
    for seed in range(20):
        anchors = np.asarray(draw_blocks(jax.random.key(seed), rows, 6, K).anchors)
        for b, row in enumerate(anchors):
            assert len(set(row)) == 6
            assert all(rows.answer[b, a] and 1 <= a <= LENGTH - K for a in row)
            seen |= {(b, a) for a in row}
    candidates = {(b, a) for b in range(4) for a in range(1, LENGTH - K + 1) if rows.answer[b, a]}
    assert seen == candidates  # every candidate is drawn at least once


def test_too_few_candidates_repeat_an_anchor_without_supervision():
    rows = stack(pack([TokenizedDialogue([1] * 5, [2] * 3)], LENGTH, pad=0))
    blocks = draw_blocks(jax.random.key(0), rows, 6, K)
    anchors, supervised = np.asarray(blocks.anchors[0]), np.asarray(blocks.supervised[0])
    assert set(anchors) == {5, 6, 7}
    assert anchors.tolist() == sorted(anchors)
    # Answer tokens are 5, 6, 7: the block at 5 may predict 6 and 7, the one at 7 nothing.
    trained = sorted(zip(anchors.tolist(), supervised.tolist(), strict=True))
    assert [pair for pair in trained if any(pair[1])] == [
        (5, [True, True, False, False]),
        (6, [True, False, False, False]),
    ]


def test_row_without_answers_has_zero_loss():
    rows = stack(pack([TokenizedDialogue([1] * 9, [])], LENGTH, pad=0))
    blocks = draw_blocks(jax.random.key(0), rows, 3, K)
    assert not np.asarray(blocks.supervised).any()
    model, frozen, diffusion = random_trees()
    loss, sums = total_loss(diffusion, frozen, model, rows, blocks, Objective(3))
    assert float(loss) == float(sums.weight) == 0.0
    assert all(np.isfinite(x).all() for x in sums.means().values())


def test_block_is_not_supervised_in_the_next_conversation():
    rows = stack(
        pack([TokenizedDialogue([1], [2, 2]), TokenizedDialogue([3], [4] * 8)], LENGTH, pad=0)
    )
    blocks = draw_blocks(jax.random.key(0), rows, 8, K)
    first = np.asarray(blocks.anchors[0]) == 2  # the first conversation's last token
    assert first.any()
    assert not np.asarray(blocks.supervised[0])[first].any()


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_block_is_supervised_in_its_own_answer_alone(turns, masks):
    """Answers are numbered here as the dialogues give them; 0 is no answer."""
    dialogues = made_dialogues(seed=turns, turns=turns, count=12)
    segments = [segment for dialogue in dialogues for segment in dialogue.segments]
    numbers = [i if i % 2 else 0 for i in range(len(segments))]
    marked = np.repeat(numbers, [len(segment) for segment in segments])
    rows = stack(pack(dialogues, LENGTH, pad=0, document_masks=masks))
    numbered = [TokenizedDialogue(*parts) for parts in _cut(marked, dialogues)]
    owner = np.array(stack(pack(numbered, LENGTH, pad=0, document_masks=masks)).tokens)
    block = 8
    blocks = draw_blocks(jax.random.key(turns), rows, 6, block)
    reached = 0
    for b, i in np.ndindex(blocks.anchors.shape):
        anchor = int(blocks.anchors[b, i])
        target = owner[b, anchor + 1 : anchor + 1 + block]
        expected = (target == owner[b, anchor]) & (owner[b, anchor] > 0)
        supervised = np.asarray(blocks.supervised[b, i])
        if supervised.any() or anchor not in np.asarray(blocks.anchors[b, :i]):
            np.testing.assert_array_equal(supervised[: len(target)], expected)
        assert not supervised[len(target) :].any()
        reached += int(((target > 0) & (target != owner[b, anchor])).sum())
    assert reached > 20  # tokens of other answers lay within the blocks


def _cut(values, dialogues):
    """The values of each dialogue's segments, as lists of the segments' lengths."""
    rest = iter(values.tolist())
    return [[[next(rest) for _ in part] for part in talk.segments] for talk in dialogues]


def test_reported_block_beyond_a_users_turn_has_no_weight_there():
    talk = TokenizedDialogue([1] * 4, [2] * 6, [3] * 3, [4] * 12)
    (rows,) = pack([talk], LENGTH + 8, pad=0)
    blocks = draw_blocks(jax.random.key(0), rows, 17, 8)
    at = np.asarray(blocks.anchors[0]).tolist().index(8)
    assert np.asarray(blocks.supervised[0, at]).astype(int).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("divergence", [Divergence.KL, Divergence.TV])
def test_student_equal_to_its_teacher_has_zero_loss_and_zero_kl_gradient(divergence):
    model, frozen, _ = random_trees()
    teacher = jax.random.normal(jax.random.key(0), (2, 9, CONFIG.hidden_size))
    source = jnp.array([[0, 3, 3, 8], [1, 2, 7, 7]])
    student = jnp.take_along_axis(teacher, source[..., None], axis=1)
    scores_of = lambda s: score_against_teacher(
        model, divergence, head_of(frozen), s, teacher, source
    )
    value, gradient = jax.value_and_grad(lambda s: scores_of(s).loss.sum())(student)
    np.testing.assert_allclose(value, 0.0, atol=1e-5)
    if divergence is Divergence.KL:  # |p - q| has a kink there: its gradient is rounding noise
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
    scores = scores_of(student)
    np.testing.assert_array_equal(scores.agreement, 1.0)
    np.testing.assert_allclose(scores.accept_prob, 1.0, rtol=1e-5)


def test_residuals_have_no_vocabulary_axis():
    model, frozen, diffusion = random_trees()
    rows, key = made_rows(), jax.random.key(0)
    loss = lambda d: mean_loss(d, frozen, model, rows, key, Objective(5))
    _, pull_back = jax.vjp(loss, diffusion)
    kept = [x.shape for x in jax.tree.leaves(pull_back) if hasattr(x, "shape")]
    assert any(
        CONFIG.intermediate_size in shape for shape in kept
    )  # the MLP's residuals: the list is not empty
    table = (VOCAB, CONFIG.hidden_size)
    assert not [shape for shape in kept if VOCAB in shape and shape != table]


def test_gradient_covers_the_diffusion_subtree_alone():
    model, frozen, diffusion = random_trees()
    rows = made_rows()
    blocks = draw_blocks(jax.random.key(0), rows, 4, K)
    gradient, sums = jax.jit(
        jax.grad(lambda d: total_loss(d, frozen, model, rows, blocks, Objective(4)), has_aux=True)
    )(diffusion)
    assert jax.tree.structure(gradient) == jax.tree.structure(diffusion)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
    assert {name: value.shape for name, value in sums.means().items()} == {
        "kl": (K,),
        "agreement": (K,),
        "overlap": (K,),
        "expected_acceptance": (),
    }


def test_expected_acceptance_is_the_mean_agreeing_prefix(monkeypatch):
    model, frozen, diffusion = random_trees()
    rows = made_rows(rows=2)
    blocks = draw_blocks(jax.random.key(3), rows, 6, K)
    agrees = lambda position: position % 5 != 3  # replaces the views' agreement

    def scripted(model, divergence, head, student, teacher, source):
        ones = jnp.ones(source.shape)
        return RowScores(ones, ones, agrees(source).astype(jnp.float32), ones)

    monkeypatch.setattr(objective, "score_against_teacher", scripted)
    _, sums = total_loss(diffusion, frozen, model, rows, blocks, Objective(6))
    prefixes = []
    for b, i in np.ndindex(blocks.anchors.shape):
        on = np.asarray(blocks.supervised[b, i])
        if on.any():
            equal = agrees(int(blocks.anchors[b, i]) + np.arange(K)) & on
            prefixes.append(np.cumprod(equal[:-1]).sum())
    assert len(set(prefixes)) > 2
    np.testing.assert_allclose(sums.means()["expected_acceptance"], np.mean(prefixes), rtol=1e-6)


@pytest.mark.parametrize(("gamma", "anchors"), [(0.0, 4), (-1.0, 4), (None, 0)])
def test_impossible_objective_is_refused(gamma, anchors):
    with pytest.raises(UserError, match="must be"):
        Objective(anchors, gamma=gamma)


def test_blocks_have_the_documented_shapes():
    blocks = draw_blocks(jax.random.key(0), made_rows(rows=2), 5, K)
    assert isinstance(blocks, Blocks)
    assert blocks.anchors.shape == (2, 5)
    assert blocks.supervised.shape == (2, 5, K)
