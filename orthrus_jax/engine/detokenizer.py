"""Token ids in as they are generated, text out that is never taken back: streaming, stop strings.

A window of the last few ids is decoded again with each id and compared with its earlier text, so
that the cost per id does not grow with the answer. Pure Python; knows nothing of the model.
"""

from collections import deque
from collections.abc import Sequence

from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import Tokenizer, decode

REPLACEMENT = "\ufffd"  # written by decoders for bytes that are not, or not yet, UTF-8
SPAN = 4  # bytes of the longest UTF-8 character; a token has at least one
PENDING = 2 * SPAN  # most ids to wait for until a replacement character at the end is final


class IncrementalDetokenizer:
    """Text of one answer as its ids arrive: whole characters only, nothing from a stop string on.

    All increments together are `decode` of all ids, however these are cut into pushes, up to the
    stop string that starts first (of several that start there: the shortest), which is left out.
    One exception: a SentencePiece byte fallback turns a whole run of bytes into U+FFFD when a later
    one is invalid; characters of that run that were released before stay.

    Attributes:
      stopped: a stop string was found; from then on ids are ignored and the text is "".
      used: ids needed for the text up to the end of the stop string; all ids if not stopped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str):
            raise UserError(f"stop is the string {stop!r}: expected a list of strings")
        if not all(stop):
            raise UserError("a stop string is empty: give at least one character")
        self.stopped = False
        self.used = 0
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._closed = False

        self._window: list[int] = []  # the last ids with text, or with a part of a character
        self._context = 0  # how many of these are only context for decoding the others
        self._decoded = ""  # the window's text
        self._final = 0  # characters of it that are final, and were moved to _withheld

        self._withheld = ""  # final text in which a stop string may still start
        self._parts: list[str] = []  # the released text, and its length
        self._released = 0
        # After [0] ids the answer's text had [1] final characters, and [2] characters in all. Only
        # entries that `used` may need: none that ends in released text.
        self._marks: deque[tuple[int, int, int]] = deque()

    @property
    def text(self) -> str:
        """Everything released so far."""
        return "".join(self._parts)

    def push(self, ids: Sequence[int]) -> str:
        """Take the next ids, any number of them; return the text that is now certain."""
        if self._closed and not self.stopped:
            raise ValueError("push after close")
        before = len(self._parts)
        for token in ids:  # one by one: the same text and the same stop for every cut
            if self.stopped:
                break
            self.used += 1
            self._take(int(token))
            self._release()
        return "".join(self._parts[before:])

    def close(self) -> str:
        """No more ids will come: return the withheld text, as the tokenizer decodes it."""
        if self._closed or self.stopped:
            return ""
        self._closed = True
        before = len(self._parts)
        self._finalize(len(self._decoded))
        self._release()
        return "".join(self._parts[before:])

    def _take(self, token: int) -> None:
        """Decode one more id after the window, then shorten the window."""
        window = [*self._window, token]
        text = decode(self._tokenizer, window)
        # Special and unknown ids must not fill the window, or it would soon hold no context. Twice,
        # because a lone space at the beginning decodes to nothing in SentencePiece tokenizers.
        if text == self._decoded and not decode(self._tokenizer, [token, token]):
            return
        self._window, self._decoded = window, text
        self._finalize(len(text.rstrip(REPLACEMENT)))
        if not text.endswith(REPLACEMENT):  # a whole character: the pending ids become context
            pending = window[self._context :]
            own = decode(self._tokenizer, pending)
            if own:  # else a leading space that was stripped; the next one would be, too
                self._window, self._context = pending, len(pending)
                self._decoded, self._final = own, len(own)
        elif len(window) - self._context > PENDING:
            # Not one unfinished character, but invalid bytes, true U+FFFD or tokens that all end in
            # the midst of a character. An unfinished character is one replacement character, so
            # all text before the last of these is final; and it begins within the last SPAN ids, so
            # that these alone end in the same one and continue as the whole answer does.
            self._finalize(len(text) - 1)
            self._window, self._context = window[-SPAN:], 0
            self._decoded = decode(self._tokenizer, self._window)
            self._final = max(len(self._decoded) - 1, 0)

    def _finalize(self, end: int) -> None:
        """Count the window's text up to character `end` as final."""
        if end > self._final:
            self._withheld += self._decoded[self._final : end]
            self._final = end

    def _release(self) -> None:
        """Release the withheld text that no stop string can start in any more, or stop."""
        end = len(self._withheld)
        if self._stop:
            final = self._released + end
            mark = (self.used, final, final + len(self._decoded) - self._final)
            if not self._marks or mark[1:] != self._marks[-1][1:]:
                self._marks.append(mark)
            if not self._closed:
                end = self._undecided()
            find = self._withheld.find
            first = min(((find(s), len(s)) for s in self._stop if find(s) >= 0), default=None)
            if first and first[0] <= end:
                end = first[0]
                self.stopped = True
                self.used = self._needed(sum(first))
        if end:
            self._parts.append(self._withheld[:end])
            self._withheld = self._withheld[end:]
            self._released += end
        while self._marks and self._marks[0][2] <= self._released:
            self._marks.popleft()

    def _undecided(self) -> int:
        """Return where in the withheld text the first unfinished stop string may start."""
        size = len(self._withheld)
        for start in range(max(0, size - self._longest + 1), size):
            if any(s.startswith(self._withheld[start:]) for s in self._stop):
                return start
        return size

    def _needed(self, end: int) -> int:
        """Return the fewest ids whose text equals ours up to `end` of _withheld."""
        for ids, final, size in self._marks:
            # A replacement character at the end of their text may have become a character since.
            rest = self._withheld[max(0, final - self._released) : end]
            if size >= self._released + end and not rest.strip(REPLACEMENT):
                return ids
        return self.used
