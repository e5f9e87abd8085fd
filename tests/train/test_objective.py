"""The objective against a plain reference that runs every block on its own, and its promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import params
from orthrus_jax.config import ModelConfig
from orthrus_jax.model import Model, Segment, View
from train.data import Conversation, pack, stack
from train.objective import Blocks, distillation_loss, kl_to_teacher, sample_blocks

K, LENGTH, VOCAB = 4, 24, 47  # 47: no other size here, so shapes tell
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    block_size=K,
    mask_token_id=VOCAB - 1,
    dtype="float32",
)


def made_rows(seed=0, rows=3, length=LENGTH):
    rng = np.random.default_rng(seed)
    ids = lambda n: rng.integers(0, VOCAB - 1, n).tolist()
    talk = [Conversation(ids(rng.integers(1, 5)), ids(rng.integers(3, 9))) for _ in range(40)]
    return stack(list(pack(talk, length, pad=0))[:rows])


def random_trees(seed=0, config=CONFIG):
    """Frozen and diffusion trees with weights large enough that the two views disagree."""
    model = Model(config)
    frozen, diffusion = params.split(params.init(model, jax.random.key(seed)))
    scale = lambda tree, by: jax.tree.map(lambda x: x * by if x.ndim > 1 else x, tree)
    noise = jax.tree.map(
        lambda x: 0.3 * jax.random.normal(jax.random.key(seed + 1), x.shape), diffusion
    )
    return model, scale(frozen, 12.0), jax.tree.map(jnp.add, scale(diffusion, 12.0), noise)


def reference_loss(diffusion, frozen, model, rows, blocks):
    """Mean KL over supervised rows: each document cut out, each block run alone, dense softmax."""
    tree = params.merge(frozen, diffusion)
    total, count = 0.0, 0
    for b in range(rows.tokens.shape[0]):
        for i, anchor in enumerate(np.asarray(blocks.anchors[b])):
            first = int(rows.start[b, anchor])
            document = jnp.array(rows.tokens[b, first : anchor + K])[None]
            clean = Segment(document, jnp.arange(document.shape[1])[None], View.AR)
            block = [int(rows.tokens[b, anchor]), *[CONFIG.mask_token_id] * (K - 1)]
            at = anchor - first + jnp.arange(K)[None]
            masked = Segment(jnp.array([block]), at, View.DIFFUSION, block=K)
            (teacher, student), _ = model.forward(tree, [clean, masked], None)
            log_p = jax.nn.log_softmax(model.logits(tree, teacher[0, -K:]))
            log_q = jax.nn.log_softmax(model.logits(tree, student[0]))
            kl = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
            for j in range(K):
                if blocks.supervised[b, i, j]:
                    total, count = total + kl[j], count + 1
    return total / count


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_equal_the_dense_reference(seed, tied):
    import dataclasses

    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    model, frozen, diffusion = random_trees(seed, config)
    rows, key = made_rows(seed), jax.random.key(seed)
    blocks = sample_blocks(key, rows, 5, K)
    assert 10 < int(blocks.supervised.sum()) < blocks.supervised.size  # some rows are not trained

    loss = lambda d: distillation_loss(d, frozen, model, rows, key, 5)[0]
    found, gradient = jax.value_and_grad(loss)(diffusion)
    with jax.default_matmul_precision("highest"):
        expected, reference = jax.value_and_grad(
            lambda d: reference_loss(d, frozen, model, rows, blocks)
        )(diffusion)
    assert float(expected) > 0.1
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(reference), strict=True):
        scale = np.abs(theirs).max()
        assert scale > 0
        assert np.abs(ours - theirs).max() <= 1e-5 * scale


def test_anchors_are_distinct_answer_tokens_that_leave_room_for_a_block():
    rows = made_rows(rows=4)
    seen = set()
    for seed in range(20):
        anchors = np.asarray(sample_blocks(jax.random.key(seed), rows, 6, K).anchors)
        for b, row in enumerate(anchors):
            assert len(set(row)) == 6
            assert all(rows.answer[b, a] and 1 <= a <= LENGTH - K for a in row)
            seen |= {(b, a) for a in row}
    candidates = {(b, a) for b in range(4) for a in range(1, LENGTH - K + 1) if rows.answer[b, a]}
    assert seen == candidates  # every candidate is drawn some time


def test_too_few_candidates_repeat_an_anchor_and_train_nothing_there():
    rows = stack(pack([Conversation([1] * 5, [2] * 3)], LENGTH, pad=0))
    blocks = sample_blocks(jax.random.key(0), rows, 6, K)
    anchors, supervised = np.asarray(blocks.anchors[0]), np.asarray(blocks.supervised[0])
    assert set(anchors[:3]) == {5, 6, 7}
    assert set(anchors[3:]) == {anchors[0]}
    assert not supervised[3:].any()
    # Answer tokens are 5, 6, 7: the block at 5 may guess 6 and 7, the one at 7 nothing.
    by_anchor = dict(zip(anchors[:3].tolist(), supervised[:3].tolist(), strict=True))
    assert by_anchor == {
        5: [True, True, False, False],
        6: [True, False, False, False],
        7: [False] * 4,
    }


def test_a_row_without_answers_trains_nothing():
    rows = stack(pack([Conversation([1] * 9, [])], LENGTH, pad=0))
    blocks = sample_blocks(jax.random.key(0), rows, 3, K)
    assert not np.asarray(blocks.supervised).any()
    model, frozen, diffusion = random_trees()
    loss, _ = distillation_loss(diffusion, frozen, model, rows, jax.random.key(0), 3)
    assert float(loss) == 0.0


def test_no_block_is_trained_on_the_next_conversation():
    rows = stack(pack([Conversation([1], [2, 2]), Conversation([3], [4] * 8)], LENGTH, pad=0))
    blocks = sample_blocks(jax.random.key(0), rows, 8, K)
    first = np.asarray(blocks.anchors[0]) == 2  # the first conversation's last token
    assert first.any()
    assert not np.asarray(blocks.supervised[0])[first].any()


def test_a_student_equal_to_its_teacher_has_zero_loss_and_zero_gradient():
    model, frozen, _ = random_trees()
    teacher = jax.random.normal(jax.random.key(0), (2, 9, CONFIG.hidden_size))
    source = jnp.array([[0, 3, 3, 8], [1, 2, 7, 7]])
    student = jnp.take_along_axis(teacher, source[..., None], axis=1)
    loss = lambda s: kl_to_teacher(model, frozen, s, teacher, source).kl.sum()
    value, gradient = jax.value_and_grad(loss)(student)
    assert float(value) == 0.0
    assert not np.asarray(gradient).any()
    scores = kl_to_teacher(model, frozen, student, teacher, source)
    np.testing.assert_array_equal(scores.agreement, 1.0)
    np.testing.assert_allclose(scores.overlap, 1.0, rtol=1e-5)


def test_nothing_of_vocabulary_size_is_kept_for_the_backward_pass():
    model, frozen, diffusion = random_trees()
    rows, key = made_rows(), jax.random.key(0)
    loss = lambda d: distillation_loss(d, frozen, model, rows, key, 5)[0]
    _, pull_back = jax.vjp(loss, diffusion)
    kept = [x.shape for x in jax.tree.leaves(pull_back) if hasattr(x, "shape")]
    assert any(CONFIG.intermediate_size in shape for shape in kept)  # the MLP's, to be sure we look
    table = (VOCAB, CONFIG.hidden_size)
    assert not [shape for shape in kept if VOCAB in shape and shape != table]


def test_only_the_diffusion_subtree_has_a_gradient():
    model, frozen, diffusion = random_trees()
    loss = functools.partial(
        distillation_loss, model=model, rows=made_rows(), key=jax.random.key(0), anchors=4
    )
    gradient, metrics = jax.grad(loss, has_aux=True)(diffusion, frozen)
    assert jax.tree.structure(gradient) == jax.tree.structure(diffusion)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient))
    assert {name: value.shape for name, value in metrics.items()} == {
        "kl": (K,),
        "agreement": (K,),
        "overlap": (K,),
    }


def test_blocks_are_a_pair_of_arrays_of_the_stated_shapes():
    blocks = sample_blocks(jax.random.key(0), made_rows(rows=2), 5, K)
    assert isinstance(blocks, Blocks)
    assert blocks.anchors.shape == (2, 5)
    assert blocks.supervised.shape == (2, 5, K)
