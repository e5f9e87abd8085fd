"""The pairwise head's training: what is recorded, what is learned, and when a head is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from orthrus_jax.decoding.guesses import top_ids
from orthrus_jax.files import read_jsonl
from orthrus_jax.model import pairwise as head_lib
from orthrus_jax.model import params
from orthrus_jax.model.pairwise import HEAD, KINDS
from tests.support.training import CONFIG, LENGTH, VOCAB, K, made_rows, random_trees
from train import pairwise
from train.objective import Blocks, both_views

M = 8


def config_of(run, **changes) -> ConfigDict:
    head = {"steps": 40, "kind": "table", "rank": 3, "blocks": 30}
    head |= {"batch_size": 8, "learning_rate": 1e-2, "gamma": 4.0}
    return ConfigDict(
        {
            "run": str(run),
            "seed": 0,
            "train": {"batch_size": 3, "accumulate": 1, "anchors": 4},
            "head": head | changes,
        }
    )


@pytest.fixture(scope="module")
def view() -> pairwise.TrainedView:
    return pairwise.TrainedView(*random_trees())


def related_blocks(count: int, seed: int) -> pairwise.RecordedBlocks:
    """Answers in which 5 n + 3 follows n; a block guesses it last, among seven likelier others.

    One time in ten it is not guessed at all.
    """
    rng = np.random.default_rng(seed)
    tokens = np.zeros((count, K + 1), np.int32)
    tokens[:, 0] = rng.integers(0, VOCAB, count)
    for j in range(K):
        tokens[:, j + 1] = (5 * tokens[:, j] + 3) % VOCAB
    others = rng.random((count, K, VOCAB))
    np.put_along_axis(others, tokens[:, 1:, None], 2.0, axis=-1)
    guesses = others.argsort(-1)[..., :M].astype(np.int32)
    guessed = rng.random((count, K)) < 0.9
    guesses[..., -1] = np.where(guessed, tokens[:, 1:], guesses[..., -1])
    log_q = np.log(np.broadcast_to([0.2] * 4 + [0.05] * 3 + [0.03], guesses.shape))
    return pairwise.RecordedBlocks(
        tokens, np.ones((count, K), bool), guesses, log_q.astype(np.float32)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_head_learns_which_token_follows_which(kind: str) -> None:
    """And where none of the guesses does: on blocks that it was not trained on."""
    recipe = config_of("", kind=kind, rank=12, steps=400, batch_size=64).head
    embedding = np.random.default_rng(0).normal(size=(VOCAB, CONFIG.hidden_size))
    embedding = embedding.astype(np.float32)
    head, loss = pairwise.fit(recipe, related_blocks(400, 0), CONFIG, embedding, seed=0)
    test = related_blocks(100, 1)
    previous, _ = head_lib.vectors(head, jnp.asarray(embedding), test.tokens[:, :-1])
    _, current = head_lib.vectors(head, jnp.asarray(embedding), test.guesses)
    pair = jnp.einsum("nkr,nkmr->nkm", previous, current)
    log_p, none = head_lib.log_probs(head, test.log_q, pair)
    guessed = test.guesses[..., -1] == test.tokens[:, 1:]
    right = np.asarray(log_p.argmax(-1) == M - 1)
    share = 0.95 if kind == "table" else 0.5  # 16 numbers per embedding hold no table of 47 tokens
    assert right[guessed].mean() > share
    if kind == "table":
        assert loss < 0.5
        none = np.exp(none)
        assert none[~guessed].mean() > 5 * none[guessed].mean()


def test_fresh_head_orders_as_the_block_does() -> None:
    head = head_lib.init(CONFIG, "table", 3, jax.random.key(0))
    blocks = related_blocks(5, 0)
    pair = jnp.zeros(blocks.log_q.shape)
    log_p, none = head_lib.log_probs(head, blocks.log_q, pair)
    np.testing.assert_allclose(log_p, blocks.log_q, atol=1e-4)
    np.testing.assert_allclose(jnp.exp(none), 1 - np.exp(blocks.log_q).sum(-1), atol=1e-4)


def test_loss_is_the_mean_over_weighted_answer_tokens() -> None:
    head = head_lib.init(CONFIG, "table", 3, jax.random.key(0))
    blocks = related_blocks(6, 2)
    supervised = np.random.default_rng(0).random((6, K)) < 0.7
    weight = np.exp(-np.arange(K) / 2.0)
    total = mass = 0.0
    for n, k in zip(*np.nonzero(supervised), strict=True):
        q = np.exp(blocks.log_q[n, k].astype(np.float64))
        right = blocks.guesses[n, k] == blocks.tokens[n, k + 1]
        total -= weight[k] * np.log(q[right].sum() if right.any() else 1 - q.sum())
        mass += weight[k]
    blocks = blocks._replace(supervised=supervised)
    embedding = jnp.zeros((VOCAB, CONFIG.hidden_size))
    loss = pairwise.cross_entropy(head, blocks, embedding, jnp.asarray(weight))
    assert float(loss) == pytest.approx(total / mass, rel=1e-4)


def test_recorded_blocks_are_guesses_after_the_answers_own_tokens(view, tmp_path) -> None:
    rows = made_rows()
    recorded = pairwise.record(config_of(tmp_path), view, rows)
    count = len(recorded.tokens)
    assert 20 < count <= 30
    assert recorded.supervised.any(axis=1).all()
    places = {tuple(rows.tokens[b, a : a + K + 1]): (b, a) for b in range(3) for a in range(1, 20)}
    for n in range(0, count, 5):
        b, a = places[tuple(recorded.tokens[n])]
        assert rows.answer[b, a]
        one = Blocks(jnp.full((3, 1), a), jnp.ones((3, 1, K), bool))
        every = type(rows)(*map(jnp.asarray, rows))
        student, _ = both_views(view.diffusion, view.frozen, view.model, every, one)
        log_q = jax.nn.log_softmax(view.model.logits(view.frozen, student[b]), axis=-1)
        assert recorded.guesses[n].tolist() == top_ids(log_q, M).tolist()
        likeliest = -np.sort(-np.asarray(log_q), axis=-1)[:, :M]
        np.testing.assert_allclose(recorded.log_q[n], likeliest, atol=1e-5)


def test_blocks_of_the_same_view_are_recorded_once(view, tmp_path, monkeypatch) -> None:
    config, rows = config_of(tmp_path), made_rows()
    first = pairwise.recorded_blocks(config, view, rows)
    calls = []
    record = pairwise.record
    monkeypatch.setattr(pairwise, "record", lambda *args: calls.append(args) or record(*args))
    again = pairwise.recorded_blocks(config, view, rows)
    assert not calls
    jax.tree.map(np.testing.assert_array_equal, first, again)
    other = view._replace(diffusion=jax.tree.map(lambda x: x * 1.1, view.diffusion))
    pairwise.recorded_blocks(config, other, rows)
    (tmp_path / pairwise.FOLDER / pairwise.BLOCKS).unlink()  # as after a kill before it was written
    pairwise.recorded_blocks(config, other, rows)
    assert len(calls) == 2


def test_stacked_layers_record_the_same_blocks(view, tmp_path) -> None:
    stacked = view._replace(
        frozen=params.stack(view.frozen), diffusion=params.stack(view.diffusion)
    )
    ours, theirs = (pairwise.record(config_of(tmp_path), v, made_rows()) for v in (stacked, view))
    np.testing.assert_array_equal(ours.guesses, theirs.guesses)
    np.testing.assert_allclose(ours.log_q, theirs.log_q, atol=1e-5)


@pytest.mark.parametrize(("with_head", "kept"), [(2.5, True), (2.0, False), (1.5, False)])
def test_head_is_kept_only_if_held_out_prompts_are_drafted_better(
    view, tmp_path, with_head: float, kept: bool, capsys
) -> None:
    def evaluate(diffusion):
        accepted = with_head if HEAD in diffusion else 2.0
        return {"acceptance_length": accepted, "tokens_per_forward": 1.0, "sample": "text"}

    head = pairwise.train_head(config_of(tmp_path), view, made_rows(), evaluate, 7)
    assert (head is not None) == kept
    assert ("left out" in capsys.readouterr().out) != kept
    ((_, record),) = read_jsonl(tmp_path / "train.jsonl")
    assert record.pop("pairwise_loss") > 0
    assert record == {
        "step": 7,
        "plain_acceptance_length": 2.0,
        "plain_tokens_per_forward": 1.0,
        "pairwise_acceptance_length": with_head,
        "pairwise_tokens_per_forward": 1.0,
    }


def test_without_steps_there_is_no_head(view, tmp_path) -> None:
    assert pairwise.train_head(config_of(tmp_path, steps=0), view, made_rows(), None, 7) is None
    assert not list(tmp_path.iterdir())
    assert LENGTH > K
