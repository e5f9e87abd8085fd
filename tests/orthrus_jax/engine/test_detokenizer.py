"""Streaming: every way of cutting the ids gives the text of all of them, up to the first stop."""

import functools
import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from orthrus_jax.engine.detokenizer import PENDING, REPLACEMENT, IncrementalDetokenizer
from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import decode, load_tokenizer
from tests.support.paths import DATA
from tests.support.tokenizers import small_tokenizer

FAMILY = "👩\u200d👩\u200d👧\u200d👦"  # one picture of seven code points, 25 bytes
SENTENCES = [
    "How many apples are 12 and 30? They are 42 apples.",
    "你好。世界。今天天气很好。",
    "cafe\u0301, nai\u0308ve, Zoe\u0308",
    f"🙂🙃 {FAMILY} 🇩🇪 👍🏽",
]
PIECES = [
    "a",
    "b",
    "ab",
    " ",
    "  ",
    "\n",
    "e\u0301",
    "世",
    "世界",
    "。",
    "🙂",
    "🙃",
    FAMILY,
    REPLACEMENT,
]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)
quick = hypothesis.settings(max_examples=150, deadline=None, derandomize=True, database=None)


@functools.cache
def trained():
    """Byte-level BPE whose larger characters are split, and partly merged across characters."""
    return small_tokenizer(SENTENCES * 5, 320)


@functools.cache
def qwen3():
    if not (DATA / "qwen3_tokenizer").is_dir():
        return None
    return load_tokenizer(DATA / "qwen3_tokenizer")


def decoder_of(tokens, decoder, special=()):
    """A tokenizer that can only decode: `tokens` are ids 0, 1, ..., then those in `special`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=tokens[0]))
    core.decoder = decoder
    core.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


PAIRS = [  # tokens that end or begin in the midst of a character
    b"\x96\xe4", b"\xb8\x96", b"\xf0\x9f", b"\x99\x82\xf0", b"\x9f\x99\x82", b"\x9f\xf0",
    b"\xb8\x96\xe4", b"a\xe4", b"\x80b", b"\xef\xbf\xbd", b"\xbf\xbd\xef", "世界".encode(), b"ab",
]  # fmt: skip
SPECIAL = 256 + len(PAIRS)
UNKNOWN = SPECIAL + 7


@functools.cache
def raw():
    """Byte-level: ids 0..255 are the bytes, then PAIRS, then a special token."""
    from tokenizers import decoders

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    letter = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}
    tokens = ["".join(letter[b] for b in pair) for pair in [*([i] for i in range(256)), *PAIRS]]
    return decoder_of(tokens, decoders.ByteLevel(), ["<|end|>"])


WORDS = ["▁", "▁▁", "▁He", "llo", "▁wor", "ld", ".", "世"]


@functools.cache
def sentencepiece():
    """As Llama's: "▁" is a space, the first is stripped; ids 8..263 are the bytes; 264 special."""
    from tokenizers import decoders

    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    return decoder_of(
        [*WORDS, *(f"<0x{b:02X}>" for b in range(256))], decoders.Sequence(steps), ["<s>"]
    )


@functools.cache
def strips():
    """Without bytes: one that strips the first space, and one that strips all at the beginning."""
    from tokenizers import decoders

    every = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 99, 0)]
    return [decoder_of(WORDS, d, ["<s>"]) for d in (decoders.Metaspace(), decoders.Sequence(every))]


def expected(tokenizer, ids, stop):
    """Text, stopped and used by their definitions, from decodes of the whole."""
    whole = decode(tokenizer, ids)
    starts = [(whole.find(s), len(s)) for s in stop if s in whole]
    if not starts:
        return whole, False, len(ids)
    start, size = min(starts)
    upto = whole[: start + size]
    used = next(n for n in range(len(ids) + 1) if decode(tokenizer, ids[:n]).startswith(upto))
    return whole[:start], True, used


def pieces(ids, cuts):
    edges = [0, *sorted(min(c, len(ids)) for c in cuts), len(ids)]
    return [ids[a:b] for a, b in itertools.pairwise(edges)]


def check(tokenizer, ids, cuts=(), stop=()):
    """Stream `ids` and compare with the definitions, after every push and at the end."""
    text, stopped, used = expected(tokenizer, ids, stop)
    stream = IncrementalDetokenizer(tokenizer, stop)
    out, count = [], 0
    for part in pieces(ids, cuts):
        was_stopped = stream.stopped
        out.append(stream.push(part))
        count += len(part)
        assert stream.text == "".join(out)
        assert text.startswith(stream.text)  # so: no half character that is not one in the end
        if was_stopped:
            assert out[-1] == ""
        if stream.stopped:
            assert (stream.text, stream.used) == (text, used)
        else:
            assert stream.used == count
            so_far = decode(tokenizer, ids[:count])
            # Withheld is only text that may start a stop string.
            held = so_far.rstrip(REPLACEMENT)[len(stream.text) :]
            assert not held or any(s.startswith(held) and s != held for s in stop), held
    out.append(stream.close())
    assert "".join(out) == stream.text == text
    assert (stream.stopped, stream.used) == (stopped, used)
    assert stream.close() == ""
    if stopped:
        assert stream.push(ids) == ""
        assert (stream.text, stream.used) == (text, used)
        assert not any(s in stream.text for s in stop)
    return stream


def stops_from(text, spans, others):
    """Stop strings that occur in the text (or nearly), and some that may not."""
    inside = [text[a % len(text) :][:n] for a, n in spans] if text else []
    return [*(s for s in inside if s), *others]


CUTS = st.lists(st.integers(0, 60), max_size=12)
SPANS = st.lists(st.tuples(st.integers(0, 99), st.integers(1, 6)), max_size=3)
OTHERS = st.lists(st.sampled_from([*PIECES, "ba", "b\n", "🙂世"]), max_size=2)


@quick
@hypothesis.given(text=TEXTS, cuts=CUTS, spans=SPANS, others=OTHERS)
def test_text_streams_as_it_decodes(text, cuts, spans, others):
    for tokenizer in filter(None, (trained(), qwen3())):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        check(tokenizer, ids, cuts)
        check(tokenizer, ids, range(len(ids)))
        check(tokenizer, ids, cuts, stops_from(text, spans, others))


RAW = st.lists(
    st.sampled_from([*range(256, UNKNOWN + 1), *b"ab \xe4\xb8\x96\xf0\x9f\x99\x82\xc3\xa9\xed\xff"])
    | st.integers(0, UNKNOWN),
    max_size=50,
)


@quick
@hypothesis.given(ids=RAW, cuts=CUTS, spans=SPANS, others=OTHERS)
def test_any_bytes_stream_as_they_decode(ids, cuts, spans, others):
    check(raw(), ids, cuts)
    check(raw(), ids, range(len(ids)))
    stop = stops_from(decode(raw(), ids), spans, others)
    assert check(raw(), ids, cuts, stop).used == check(raw(), ids, range(len(ids)), stop).used


@quick
@hypothesis.given(
    ids=st.lists(st.integers(0, 151_935), max_size=30), cuts=CUTS, spans=SPANS, others=OTHERS
)
def test_random_qwen3_ids_stream_as_they_decode(ids, cuts, spans, others):
    if qwen3() is None:
        pytest.skip("../shared is not here")
    check(qwen3(), ids, cuts)
    check(qwen3(), ids, cuts, stops_from(decode(qwen3(), ids), spans, others))


def fallback(text):
    return [len(WORDS) + b for b in text.encode()]


@quick
@hypothesis.given(
    parts=st.lists(
        st.integers(0, 7).map(lambda i: [i])
        | st.sampled_from([[264], fallback("é"), fallback("界"), fallback("🙂"), fallback(FAMILY)]),
        max_size=20,
    ),
    cuts=CUTS,
    spans=SPANS,
)
def test_first_space_is_stripped_once(parts, cuts, spans):
    ids = [i for part in parts for i in part]
    stop = stops_from(decode(sentencepiece(), ids), spans, [])
    check(sentencepiece(), ids, cuts)
    check(sentencepiece(), ids, range(len(ids)))
    check(sentencepiece(), ids, cuts, stop)
    words = [i for i in ids if i < len(WORDS)]
    for tokenizer in strips():
        check(tokenizer, words, cuts)
        check(tokenizer, words, cuts, stops_from(decode(tokenizer, words), spans, []))


def test_character_is_released_whole_with_its_last_byte():
    stream = IncrementalDetokenizer(raw())
    released = [stream.push([b]) for b in "a世🙂".encode()]
    assert released == ["a", "", "", "世", "", "", "", "🙂"]
    assert stream.push([]) == stream.close() == ""
    assert stream.text == "a世🙂"


def test_special_and_unknown_ids_are_no_text_even_within_a_character():
    stream = IncrementalDetokenizer(raw())
    nothing = [SPECIAL, UNKNOWN] * 40
    assert stream.push([*nothing, 0xE4, *nothing, 0xB8, *nothing]) == ""
    assert stream.push([0x96]) == "世"
    assert stream.push([*nothing, *b" x"]) == " x"
    assert stream.used == 4 * len(nothing) + 5


def test_true_and_invalid_replacement_characters_are_released():
    true_hole = 256 + PAIRS.index(b"\xef\xbf\xbd")
    stream = IncrementalDetokenizer(raw())
    assert stream.push([true_hole]) == ""  # it could be the beginning of a character
    assert stream.push(b"a") == REPLACEMENT + "a"
    assert stream.push(b"\xff\xe4") == ""
    assert stream.push(b"b") == REPLACEMENT * 2 + "b"
    assert stream.push(b"\xf0\x9f") == ""
    assert stream.close() == REPLACEMENT
    for ids in ([true_hole] * 100, [0x80] * 100, [0xE4] * 100):  # with no valid text after it
        stream = IncrementalDetokenizer(raw())
        lengths = [len(stream.push([i])) for i in ids]
        assert sum(lengths) >= 99 - PENDING
        assert stream.text + stream.close() == REPLACEMENT * 100


@pytest.mark.parametrize("invalid", [[0xFF], [0x80], [0xF0], [256 + PAIRS.index(b"\x9f\xf0")]])
def test_characters_after_many_invalid_bytes_are_whole(invalid):
    for count in range(3 * PENDING):
        ids = [*invalid * count, *"🙂世é".encode(), *invalid, *"🙂".encode()]
        check(raw(), ids, range(len(ids)))
        check(raw(), ids, range(len(ids)), ["世é"])


def test_stop_strings_across_tokens_and_pushes():
    stream = IncrementalDetokenizer(raw(), ["END", "\n\n"])
    assert stream.push(b"one E") == "one "
    assert stream.push(b"N") == ""
    assert stream.push(b"d\n") == "ENd"
    assert stream.push(b"EEN") == "\nE"
    assert not stream.stopped
    assert stream.used == 11
    assert stream.push(b"D, never seen") == ""
    assert stream.stopped
    assert (stream.text, stream.used) == ("one ENd\nE", 12)
    assert stream.push(b"more") == stream.close() == ""
    assert stream.used == 12


def test_a_withheld_back_beginning_of_a_stop_comes_out_at_the_end():
    stream = IncrementalDetokenizer(raw(), ["END"])
    assert stream.push(b"the EN\xe4") == "the "
    assert stream.close() == "EN" + REPLACEMENT
    assert not stream.stopped
    assert stream.used == 7
    with pytest.raises(ValueError, match="after close"):
        stream.push(b"D")


@pytest.mark.parametrize(
    ("stop", "text", "released", "used"),
    [
        (["bc", "abcd"], "xabcd", "x", 5),  # the first to start, though it is whole later
        (["bc", "abcd"], "xabce", "xa", 4),  # undecided until the "e"
        (["bc", "abcd"], "xabc", "xa", 4),  # undecided until the end
        (["abc", "ab"], "xabc", "x", 3),  # both start there: the shorter
        (["ab", "b"], "xb", "x", 2),
        (["aab"], "aaab", "a", 4),  # the match begins within a failed one
        (["世界", "界"], "世世界", "世", 9),
        (["y"], "xyy", "x", 2),
    ],
)
def test_the_first_stop_to_start_wins(stop, text, released, used):
    ids = list(text.encode())
    for cuts in ((), range(len(ids))):
        stream = check(raw(), ids, cuts, stop)
        assert (stream.text, stream.used, stream.stopped) == (released, used, True)


def test_used_ends_with_the_token_that_ends_the_stop():
    ab, split = 256 + PAIRS.index(b"ab"), 256 + PAIRS.index(b"a\xe4")
    stream = check(raw(), [ab, SPECIAL, ab, SPECIAL, 0x78], stop=["ba"])
    assert (stream.text, stream.used) == ("a", 3)
    stream = check(raw(), [ab, split, 0xB8, 0x96], stop=["ba"])  # whole before the character is
    assert (stream.text, stream.used) == ("a", 2)
    stream = check(raw(), [0x61, 0xE4, 0xB8, 0x62], stop=[REPLACEMENT])  # found with the "b"
    assert (stream.text, stream.used) == ("a", 2)
    stream = check(
        raw(), [0xE4, 0xB8, 0x96, 0xFF, 0x62], stop=[REPLACEMENT]
    )  # not the half character
    assert (stream.text, stream.used) == ("世", 4)
    stream = check(raw(), [0x61, 0xFF], stop=[REPLACEMENT])  # found by close
    assert (stream.text, stream.used, stream.stopped) == ("a", 2, True)


class Counting:
    """A tokenizer that notes how many ids it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids = tokenizer, 0

    def decode(self, ids, **options):
        self.ids += len(ids)
        return self.tokenizer.decode(ids, **options)


LONG = {
    "text": lambda: list(" ".join(["ab 世界。", FAMILY] * 80).encode()),
    "special": lambda: [0x61, 0xE4] + [SPECIAL] * 1998,
    "unknown": lambda: [UNKNOWN] * 2000,
    "true holes": lambda: [256 + PAIRS.index(b"\xef\xbf\xbd")] * 2000,
    "continuation": lambda: [0x80] * 2000,
    "lead": lambda: [0xF0] * 2000,
    "no boundary": lambda: [0xE4] + [256 + PAIRS.index(b"\xb8\x96\xe4")] * 1999,
    "no boundary, no text": lambda: [256 + PAIRS.index(b"\x9f\xf0")] * 2000,
    "almost a stop": lambda: list(b"STO" * 667),
}


@pytest.mark.parametrize("kind", LONG)
def test_work_per_id_does_not_grow_with_the_answer(kind):
    ids = LONG[kind]()
    ids = ids * (2000 // len(ids) + 1)
    counting = Counting(raw())
    stream = IncrementalDetokenizer(counting, ["STOP", "\x00" * 5])
    most = 0
    for i in ids[:2000]:
        before = counting.ids
        stream.push([i])
        most = max(most, counting.ids - before)
        assert len(stream._window) <= 2 * PENDING + 1
        assert len(stream._withheld) < 8
        assert len(stream._marks) <= 2 * PENDING
    stream.close()
    assert stream.text == decode(raw(), ids[:2000])
    assert most <= 3 * PENDING + 3
    if kind == "text":
        assert counting.ids < 2000 * 8


def test_numpy_ids_and_bad_stops():
    stream = IncrementalDetokenizer(raw(), ("z",))
    assert stream.push(np.frombuffer(b"ab", np.uint8).astype(np.int32)) == "ab"
    assert IncrementalDetokenizer(raw()).close() == ""
    with pytest.raises(ValueError, match="empty"):
        IncrementalDetokenizer(raw(), ["a", ""])
    with pytest.raises(UserError, match="list of strings"):
        IncrementalDetokenizer(raw(), "abc")
