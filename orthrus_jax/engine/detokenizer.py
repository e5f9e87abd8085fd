"""Token ids in as they are generated, text out that is never taken back: streaming, stop strings.

A window of the last few ids is decoded anew with each id and compared with what it gave before, so
that the cost of an id does not grow with the answer. Pure Python; knows nothing of the model.
"""

from collections import deque
from collections.abc import Sequence

from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import Tokenizer, decode

HOLE = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, UTF-8
SPAN = 4  # bytes of the longest UTF-8 character; a token has at least one
PENDING = 2 * SPAN  # ids with a hole at their end that are waited for before the hole is believed


class TextStream:
    """Text of one row as its tokens arrive: whole characters only, nothing at or behind a stop.

    All increments together are `decode` of all ids, however these are cut into pushes, up to the
    stop string that starts first (of several that start there: the shortest). It itself is left
    out. One exception: a SentencePiece byte fallback turns a whole run of bytes into U+FFFD when a
    later one is invalid; characters of that run that are out by then stay.

    Attributes:
      stopped: a stop string was found; from then on ids are ignored and the text is "".
      used: ids that the text up to the end of the stop string needs; all ids when not stopped.
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

        self._window: list[int] = []  # the last ids that have text, or a part of a character
        self._context = 0  # of these, how many are there for the others to be decoded behind
        self._decoded = ""  # the window's text
        self._sure = 0  # characters of it that are final, and went to _held

        self._held = ""  # final text that a stop string may still start in
        self._parts: list[str] = []  # all that was released, and its length
        self._released = 0
        # After how many ids [0] the answer's text had [1] final characters, [2] characters in all.
        # Only what may be needed for `used`: nothing that ends in released text.
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
        """No more ids will come: return what was held back, as the tokenizer decodes it."""
        if self._closed or self.stopped:
            return ""
        self._closed = True
        before = len(self._parts)
        self._hold(len(self._decoded))
        self._release()
        return "".join(self._parts[before:])

    def _take(self, token: int) -> None:
        """Decode one more id behind the window, then shorten the window."""
        window = [*self._window, token]
        text = decode(self._tokenizer, window)
        # Special and unknown ids must not fill the window, or it would soon hold no context. Twice,
        # because a lone space at the beginning decodes to nothing in SentencePiece tokenizers.
        if text == self._decoded and not decode(self._tokenizer, [token, token]):
            return
        self._window, self._decoded = window, text
        self._hold(len(text.rstrip(HOLE)))
        if not text.endswith(HOLE):  # a whole character ends here: the pending ids become context
            pending = window[self._context :]
            own = decode(self._tokenizer, pending)
            if own:  # else a leading space that was stripped; the next one would be, too
                self._window, self._context = pending, len(pending)
                self._decoded, self._sure = own, len(own)
        elif len(window) - self._context > PENDING:
            # Not one character in the making, but invalid bytes, true U+FFFD or tokens that all end
            # in the midst of a character. An unfinished character is one hole, so all before the
            # last hole is final; and it begins within the last SPAN ids, so that these alone end in
            # the same hole and go on as the whole answer does.
            self._hold(len(text) - 1)
            self._window, self._context = window[-SPAN:], 0
            self._decoded = decode(self._tokenizer, self._window)
            self._sure = max(len(self._decoded) - 1, 0)

    def _hold(self, end: int) -> None:
        """Count the window's text up to character `end` as final."""
        if end > self._sure:
            self._held += self._decoded[self._sure : end]
            self._sure = end

    def _release(self) -> None:
        """Release of the held text all that no stop string can start in, or stop."""
        end = len(self._held)
        if self._stop:
            sure = self._released + end
            mark = (self.used, sure, sure + len(self._decoded) - self._sure)
            if not self._marks or mark[1:] != self._marks[-1][1:]:
                self._marks.append(mark)
            if not self._closed:
                end = self._undecided()
            found = min(
                ((self._held.find(s), len(s)) for s in self._stop if s in self._held), default=None
            )
            if found and found[0] <= end:
                end = found[0]
                self.stopped = True
                self.used = self._needed(sum(found))
        if end:
            self._parts.append(self._held[:end])
            self._held = self._held[end:]
            self._released += end
        while self._marks and self._marks[0][2] <= self._released:
            self._marks.popleft()

    def _undecided(self) -> int:
        """Return where in the held text the first stop string that is not yet whole may start."""
        size = len(self._held)
        for start in range(max(0, size - self._longest + 1), size):
            if any(s.startswith(self._held[start:]) for s in self._stop):
                return start
        return size

    def _needed(self, end: int) -> int:
        """Return the smallest number of ids whose text begins as ours does to `end` of _held."""
        for ids, sure, size in self._marks:
            # A hole at the end of those ids' text may have become a character since, or not.
            rest = self._held[max(0, sure - self._released) : end]
            if size >= self._released + end and not rest.strip(HOLE):
                return ids
        return self.used
