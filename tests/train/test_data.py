"""Packing, the assistant mask, files of rows and batches, on rows small enough to write out."""

import itertools
import json

import numpy as np
import pytest

from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import encode_messages, load_tokenizer
from tests.support.paths import DATA
from train.data import (
    ChatEncoder,
    Loader,
    TokenizedDialogue,
    open_rows,
    pack,
    stack,
    write_rows,
)
from train.prompts import Skip

QWEN3 = DATA / "qwen3_tokenizer"


def test_row_holds_whole_conversations_and_padding():
    talk = [TokenizedDialogue([1, 2], [3, 4, 5]), TokenizedDialogue([6], [7, 8])]
    (row,) = pack(talk, 10, pad=0)
    assert row.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 0, 0]]
    assert row.start.tolist() == [[0, 0, 0, 0, 0, 5, 5, 5, 8, 9]]
    assert row.answer.astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 1, 1, 0, 0]]
    assert row.used.astype(int).tolist() == [[1] * 8 + [0, 0]]


def test_conversation_that_does_not_fit_opens_the_next_row():
    rows = list(pack([TokenizedDialogue([1], [2, 3]), TokenizedDialogue([4], [5, 6])], 5, pad=9))
    assert [r.tokens[0].tolist() for r in rows] == [[1, 2, 3, 9, 9], [4, 5, 6, 9, 9]]


def test_conversation_longer_than_a_row_is_cut_at_its_end():
    (row,) = pack([TokenizedDialogue([1, 2], [3, 4, 5, 6])], 4, pad=9)
    assert row.tokens.tolist() == [[1, 2, 3, 4]]
    assert row.answer.tolist() == [[False, False, True, True]]


def test_packing_nothing_gives_no_row():
    assert list(pack([], 8, pad=0)) == list(pack([], 8, pad=0, document_masks=False)) == []


def test_dialogue_is_one_document_with_every_answer_marked():
    (row,) = pack([TokenizedDialogue([1, 2], [3], [4, 5], [6, 7])], 8, pad=0)
    assert row.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert row.answer.astype(int).tolist() == [[0, 0, 1, 0, 0, 1, 1, 0]]
    assert row.start.tolist() == [[0] * 7 + [7]]


def test_stream_without_document_masks_is_cut_into_full_rows():
    talk = [
        TokenizedDialogue([1, 2], [3, 4, 5]),
        TokenizedDialogue([6], [7, 8]),
        TokenizedDialogue([9], [9]),
    ]
    rows = stack(pack(talk, 4, pad=0, document_masks=False))
    assert rows.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 0, 0]]
    assert rows.answer.astype(int).tolist() == [[0, 0, 1, 1], [1, 0, 1, 1], [0, 1, 0, 0]]
    assert rows.used.astype(int).tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert rows.start.tolist() == [[0] * 4] * 3
    long = TokenizedDialogue(list(range(1, 8)), [8, 9])  # over more than two rows
    cut = stack(pack([long], 4, pad=0, document_masks=False))
    assert cut.tokens.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 0, 0, 0]]


@pytest.fixture(scope="module")
def qwen3():
    if not QWEN3.is_dir():
        pytest.skip("needs shared/data/qwen3_tokenizer")
    return load_tokenizer(QWEN3)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_encoder_marks_every_answer_with_its_end_of_turn(qwen3):
    talk = [{"role": "system", "content": "Be brief."}, user("One?"), assistant("1")]
    dialogue = ChatEncoder(qwen3)([*talk, user("Two?"), assistant("2\n"), user("Unanswered?")])
    texts = [qwen3.decode(segment) for segment in dialogue.segments]
    assert texts == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "1<|im_end|>",
        "\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n",
        "2\n<|im_end|>",
    ]
    ids, answer = dialogue.arrays()
    assert qwen3.decode(ids[answer]) == "1<|im_end|>2\n<|im_end|>"


def test_encoder_gives_the_prompt_of_generation(qwen3):
    dialogue = ChatEncoder(qwen3)([user("What is 2+2?"), assistant("\\boxed{4}")])
    prompt, answer = dialogue.segments
    assert list(prompt) == encode_messages(qwen3, [user("What is 2+2?")], thinking=False)
    assert qwen3.decode(answer) == "\\boxed{4}<|im_end|>"


def test_thinking_part_belongs_to_the_answer(qwen3):
    thought = "<think>\nHm.\n</think>\n\n4"
    prompt, answer = ChatEncoder(qwen3)([user("2+2?"), assistant(thought)]).segments
    assert list(prompt) == encode_messages(qwen3, [user("2+2?")], thinking=True)
    assert qwen3.decode(answer) == thought + "<|im_end|>"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([user("Hi")], "no answer"),
        ([user("<|im_start|>assistant\nHo"), assistant("x")], "template's own marks"),
        ([user("Hi"), assistant("Ho<|im_end|>")], "template's own marks"),
    ],
)
def test_dialogue_with_ambiguous_answers_is_skipped(qwen3, messages, reason):
    with pytest.raises(Skip, match=reason):
        ChatEncoder(qwen3)(messages)


def numbered(count):
    return stack(pack([TokenizedDialogue([i], [i, i]) for i in range(count)], 3, pad=0))


def first_tokens(loader, count):
    return [batch.tokens[:, 0].tolist() for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("size", [1, 2, 6])
def test_epoch_visits_every_row_once_and_epochs_differ(size):
    stream = Loader(numbered(6), size, seed=0)
    epochs = [first_tokens(stream, 6 // size) for _ in range(3)]
    for epoch in epochs:
        assert sorted(itertools.chain.from_iterable(epoch)) == [0, 1, 2, 3, 4, 5]
    assert epochs[0] != epochs[1]


def test_incomplete_last_batch_of_an_epoch_is_dropped():
    epochs = first_tokens(Loader(numbered(7), 3, 0), 40)
    pairs = [first + second for first, second in zip(epochs[::2], epochs[1::2], strict=True)]
    assert all(len(set(pair)) == 6 for pair in pairs)
    assert {tuple(set(range(7)) - set(pair)) for pair in pairs} == {(i,) for i in range(7)}


def test_batches_depend_on_the_seed_alone():
    epochs = lambda seed: first_tokens(Loader(numbered(20), 5, seed), 12)
    assert epochs(3) == epochs(3)
    for batch in epochs(4):  # not even another epoch of a neighbouring seed
        assert batch not in epochs(3)


def test_loader_refuses_too_few_rows_and_an_uneven_number_of_hosts():
    with pytest.raises(UserError, match="3 rows do not fill one batch of 4"):
        Loader(numbered(3), 4, seed=0)
    with pytest.raises(UserError, match="a batch of 4 rows does not divide by 3"):
        Loader(numbered(9), 4, 0, process_index=0, process_count=3)


@pytest.mark.parametrize("taken", [0, 2, 5, 9])  # an epoch has 4 batches
def test_restored_loader_continues_with_the_same_batches(taken):
    whole = first_tokens(Loader(numbered(9), 2, 1), 20)
    loader = Loader(numbered(9), 2, 1)
    first = first_tokens(loader, taken)
    state = json.loads(json.dumps(loader.state()))
    rest = first_tokens(loader, 3)  # batches returned later are not in the state
    again = Loader(numbered(9), 2, 1)
    next(again)
    again.restore(state)
    assert first + first_tokens(again, 20 - taken) == whole
    assert first + rest == whole[: taken + 3]


@pytest.mark.parametrize(
    ("other", "name"), [((8, 2, 1), "rows"), ((9, 3, 1), "batch_size"), ((9, 2, 2), "seed")]
)
def test_loader_state_of_another_order_is_refused(other, name):
    count, size, seed = other
    with pytest.raises(UserError, match=f"position in the data is for {name}="):
        Loader(numbered(9), 2, 1).restore(Loader(numbered(count), size, seed).state())


def test_host_slices_are_disjoint_and_make_up_the_batch():
    whole = first_tokens(Loader(numbered(19), 6, 2), 8)
    parts = [first_tokens(Loader(numbered(19), 6, 2, i, 3), 8) for i in range(3)]
    for n, batch in enumerate(whole):
        assert list(itertools.chain.from_iterable(part[n] for part in parts)) == batch
        assert len(set(batch)) == 6
    pair = [Loader(numbered(19), 6, 2, i, 2) for i in range(2)]  # resumed on two hosts of three
    loader = Loader(numbered(19), 6, 2, 1, 3)
    first_tokens(loader, 3)
    for half in pair:
        half.restore(loader.state())
    assert [a + b for a, b in zip(*(first_tokens(p, 5) for p in pair), strict=True)] == whole[3:]


def random_talk(count):
    rng = np.random.default_rng(0)
    ids = lambda: rng.integers(1, 99, rng.integers(1, 12)).tolist()
    return [TokenizedDialogue(ids(), ids()) for _ in range(count)]


@pytest.mark.parametrize("masks", [True, False])
def test_rows_on_disk_equal_the_rows_in_memory(tmp_path, masks):
    talk = random_talk(300)
    written = write_rows(
        tmp_path / "rows", talk, length=16, pad=0, document_masks=masks, recipe={"from": "x"}
    )
    expected = stack(pack(talk, 16, 0, document_masks=masks))
    for rows in (written, open_rows(tmp_path / "rows")):
        assert all(isinstance(part, np.memmap) for part in rows)
        for part, other in zip(rows, expected, strict=True):
            np.testing.assert_array_equal(part, other)
    about = json.loads((tmp_path / "rows" / "rows.json").read_text())
    assert about["rows"] == len(expected.tokens)
    assert about["conversations"] == 300
    assert about["tokens"] == expected.used.sum()
    assert about["answer_tokens"] == expected.answer.sum()
    assert about["longer_than_a_row"] == sum(sum(map(len, c.segments)) > 16 for c in talk) > 0
    batch, same = next(Loader(written, 4, 0)), next(Loader(expected, 4, 0))
    for part, other, dtype in zip(batch, same, (np.int32, np.int32, bool, bool), strict=True):
        np.testing.assert_array_equal(part, other)
        assert part.dtype == other.dtype == dtype


def test_existing_rows_are_reused_and_another_recipe_is_refused(tmp_path):
    write = lambda talk, **changes: write_rows(
        tmp_path / "rows", talk, **{"length": 8, "pad": 0, "recipe": {"from": "x"}, **changes}
    )
    first = write(random_talk(9)).tokens.tolist()
    untouched = (pytest.fail("packed again") for _ in range(1))
    assert write(untouched).tokens.tolist() == first
    with pytest.raises(UserError, match=r"length 8, now 9, from 'x', now 'y'\)") as error:
        write(untouched, length=9, recipe={"from": "y"})
    assert "\n" not in str(error.value)
    assert write(random_talk(3), length=9, overwrite=True).tokens.shape[1] == 9


def test_interrupted_packing_leaves_no_files(tmp_path):
    def torn():
        yield from random_talk(9)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rows(tmp_path / "rows", torn(), length=8, pad=0, recipe={})
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="no conversation to pack"):
        write_rows(tmp_path / "rows", [], length=8, pad=0, recipe={})
    with pytest.raises(UserError, match="holds no whole packed rows"):
        open_rows(tmp_path / "rows")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        write_rows(tmp_path / "rows", random_talk(2), length=8, pad=0, recipe={}, overwrite=True)


def test_truncated_rows_are_refused(tmp_path):
    write_rows(tmp_path / "rows", random_talk(50), length=8, pad=0, recipe={})
    path = tmp_path / "rows" / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="holds no whole packed rows"):
        open_rows(tmp_path / "rows")
