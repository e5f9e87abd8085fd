"""Packing and batching, on rows small enough to write down."""

import itertools

import numpy as np
import pytest

from train.data import Conversation, batches, pack, stack


def test_whole_conversations_fill_a_row_and_the_rest_is_padding():
    talk = [Conversation([1, 2], [3, 4, 5]), Conversation([6], [7, 8])]
    (row,) = pack(talk, 10, pad=0)
    assert row.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 0, 0]]
    assert row.start.tolist() == [[0, 0, 0, 0, 0, 5, 5, 5, 8, 9]]
    assert row.answer.astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 1, 1, 0, 0]]
    assert row.used.astype(int).tolist() == [[1] * 8 + [0, 0]]


def test_a_conversation_that_does_not_fit_opens_the_next_row():
    rows = list(pack([Conversation([1], [2, 3]), Conversation([4], [5, 6])], 5, pad=9))
    assert [r.tokens[0].tolist() for r in rows] == [[1, 2, 3, 9, 9], [4, 5, 6, 9, 9]]


def test_a_conversation_longer_than_a_row_is_cut_at_its_end():
    (row,) = pack([Conversation([1, 2], [3, 4, 5, 6])], 4, pad=9)
    assert row.tokens.tolist() == [[1, 2, 3, 4]]
    assert row.answer.tolist() == [[False, False, True, True]]


def test_packing_nothing_gives_no_row():
    assert list(pack([], 8, pad=0)) == []


def numbered(count):
    return stack(pack([Conversation([i], [i, i]) for i in range(count)], 3, pad=0))


def test_an_epoch_visits_every_row_once_and_epochs_differ():
    stream = batches(numbered(6), 2, seed=0)
    epochs = [[b.tokens[:, 0].tolist() for b in itertools.islice(stream, 3)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain.from_iterable(epoch)) == [0, 1, 2, 3, 4, 5]
    assert epochs[0] != epochs[1]


def test_batches_depend_on_the_seed_and_on_nothing_else():
    first = lambda seed: next(batches(numbered(20), 5, seed)).tokens
    np.testing.assert_array_equal(first(3), first(3))
    assert (first(3) != first(4)).any()


def test_fewer_rows_than_a_batch_is_an_error():
    with pytest.raises(ValueError, match="3 rows do not fill one batch of 4"):
        next(batches(numbered(3), 4, seed=0))
