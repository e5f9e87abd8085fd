"""Prompts for distillation: sources, the formats of their rows, and a mix of them by weight.

A source is a hub data set, local JSONL or Parquet, or the made problems. Rows are streamed: a mix
of any size holds a few thousand prompts in memory. A row without a usable prompt is skipped, and
counted by reason. Knows no model; the caller passes the function that encodes messages.
"""

import collections
import contextlib
import dataclasses
import glob
import gzip
import itertools
import json
import logging
import os
import pathlib
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line
from train.problems import SPLITS, problems

TEXTS = ("prompt", "question", "problem")  # columns that may hold the user's text
DIALOGUES = ("prompt", "messages", "conversations", "input")  # columns that may hold messages
COLUMNS = tuple(dict.fromkeys((*TEXTS, *DIALOGUES)))  # tried in this order
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
OPTIONS = {"hub": ("config", "split", "revision"), "files": (), "problems": ("split", "seed")}
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
IN_VAIN = 10_000  # made problems in a row that are skipped before no more are tried
BUFFER = 8192  # size of the window in which the prompts of a source are shuffled

Messages = list[dict[str, str]]


class Skip(Exception):  # noqa: N818 (an outcome that is counted, not an error)
    """A row that cannot be used; the message is the reason, a few words shared by many rows."""


class Prompt(NamedTuple):
    """Messages before the assistant's first answer, their ids, and their source."""

    messages: Messages
    ids: list[int]
    source: str


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of rows. `kind` is a key of OPTIONS, `options` has some of that key's names."""

    kind: str
    name: str
    options: Mapping[str, str]

    def rows(self, seed: int) -> Iterator[Any]:
        """Yield raw rows in a fixed order; a `Skip` in place of one that cannot be read."""
        if self.kind == "problems":
            split, seed = self.options.get("split", "train"), int(self.options.get("seed", seed))
            return ({"prompt": problem.question} for problem in problems(split, seed))
        if self.kind == "hub":
            return _hub_rows(self.name, self.options)
        return itertools.chain.from_iterable(map(file_rows, local_files(self.name)))


def parse_source(text: str) -> Source:
    """Parse a source of a configuration: `NAME` or `NAME?option=value&option=value`.

    NAME is a file or glob that ends in .jsonl, .jsonl.gz or .parquet; a directory of such files; a
    hub id owner/name (options config, split: "train" by default, revision); or "problems", the made
    problems (options split, seed).

    Raises:
      UserError: for any other name, and for an unknown option.
    """
    name, _, query = text.partition("?")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    if name == "problems":
        kind = "problems"
    elif name.endswith(SUFFIXES) or os.path.exists(name) or glob.glob(name):
        kind = "files"
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        kind = "hub"
    else:
        raise UserError(
            f"the source {text!r} is no hub id owner/name, no file that ends in "
            f"{', '.join(SUFFIXES)}, and not 'problems'"
        )
    if unknown := sorted(set(options) - set(OPTIONS[kind])):
        allowed = ", ".join(OPTIONS[kind]) or "none"
        raise UserError(f"the source {text!r} has the option {unknown[0]}; known: {allowed}")
    if kind == "problems" and options.get("split", "train") not in SPLITS:
        raise UserError(f"the source {text!r} has a split that is none of {', '.join(SPLITS)}")
    if not options.get("seed", "0").isdecimal():
        raise UserError(f"the source {text!r} has a seed that is no whole number")
    return Source(kind, name, options)


def local_files(name: str | pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a path, a glob or a directory, sorted by name.

    Raises:
      UserError: when there is no file.
    """
    path = pathlib.Path(name)
    inside = path.iterdir() if path.is_dir() else map(pathlib.Path, glob.glob(str(name)))
    files = sorted(file for file in inside if file.name.endswith(SUFFIXES) and file.is_file())
    if path.is_file() and path.name.endswith(
        SUFFIXES
    ):  # its name may contain a glob's special characters
        files = [path]
    if not files:
        raise UserError(
            f"{name} is not there: give files or a directory of {', '.join(SUFFIXES)}, or the id "
            "owner/name of a data set on the hub, with network access"
        )
    return files


def file_rows(path: pathlib.Path, columns: Sequence[str] = COLUMNS) -> Iterator[Any]:
    """Yield the rows of a JSONL or Parquet file; a `Skip` for a line that is not JSON.

    Of a Parquet file only the existing ones of `columns` are read.

    Raises:
      UserError: when the file cannot be read or is damaged.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path, columns)
            return
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as lines:
            yield from (_parse(line) for line in lines if line.strip())
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error):.120}): truncated or damaged"
        ) from None


def _parquet_rows(path: pathlib.Path, columns: Sequence[str]) -> Iterator[Any]:
    import pyarrow.parquet  # late: a training step is timed where it is not installed

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            known = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=256, columns=known or None):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(error) from None


def _parse(line: bytes) -> Any:
    """The value of a line, which may begin with a byte order mark; a `Skip` for anything else."""
    try:
        value = json.loads(line.decode("utf-8-sig"))
        if rb"\u" in line:  # an escape may be half of a pair, which is no character
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeDecodeError:
        return Skip("not UTF-8")
    except UnicodeEncodeError:
        return Skip("a lone surrogate")
    except (ValueError, RecursionError):
        return Skip("not JSON")


def _hub_rows(name: str, options: Mapping[str, str]) -> Iterator[Any]:
    """Stream a split of a data set from the hub; only the rows that are read are fetched."""
    for library in ("datasets", "huggingface_hub"):  # offline they log each of many retries
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        import datasets  # late: it takes seconds

        yield from datasets.load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
    except Exception as error:  # offline, no such set or split, gated: the library raises anything
        raise UserError(
            f"{name} cannot be had from the hub ({first_line(error):.160}): go online (with "
            f"HF_TOKEN where it is gated), or give its rows as local files, {', '.join(SUFFIXES)}"
        ) from None


def prompt_of(row: Any) -> Messages:
    """Find the prompt in a row: its dialogue before the assistant's first answer.

    Raises:
      Skip: for a prompt that is missing, empty, or of another type.
    """
    return opening(dialogue_of(row))


def dialogue_of(row: Any) -> Messages:
    """Read the first of COLUMNS that a row has; a text is one message of the user.

    Raises:
      Skip: for a dialogue that is missing or of another type.
    """
    if isinstance(row, Skip):
        raise row
    if not isinstance(row, Mapping):
        raise Skip("not an object")
    for name in COLUMNS:
        value = row.get(name)
        if isinstance(value, str) and name in TEXTS:
            return [{"role": "user", "content": value}]
        if isinstance(value, list) and name in DIALOGUES:
            return messages_of(value)
        if value is not None:
            raise Skip(f"{name} of wrong type")
    raise Skip("no prompt")


def messages_of(value: Sequence[Any]) -> Messages:
    """Read a dialogue of role/content or ShareGPT's from/value; drop empty system messages.

    Raises:
      Skip: for a message that is not text, or with a role other than system, user, assistant.
    """
    messages = []
    for message in value:
        if not isinstance(message, Mapping):
            raise Skip("a message of wrong type")
        role = message.get("role") or message.get("from")
        content = message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise Skip("a message of wrong type")
        role = ROLES.get(role, role)
        if role not in ("system", "user", "assistant"):
            raise Skip("a message by a tool or an unknown role")
        if role != "system" or content.strip():
            messages.append({"role": role, "content": content})
    return messages


def opening(messages: Messages) -> Messages:
    """Return the messages before the first answer.

    Raises:
      Skip: when the user's text there is empty or a placeholder like "-".
    """
    is_prompt = lambda message: message["role"] != "assistant"
    prompt = list(itertools.takewhile(is_prompt, messages))
    text = "".join(message["content"] for message in prompt if message["role"] == "user")
    if not any(map(str.isalnum, text)):
        raise Skip("empty prompt")
    return prompt


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Divide `total` by weight into whole numbers, by the largest-remainder method.

    Raises:
      UserError: for weights that are not positive.
    """
    if not weights or not all(np.isfinite(w) and w > 0 for w in weights):
        raise UserError(f"a mix needs sources with weights above 0, not {list(weights)}")
    exact = np.array(weights, np.float64) / sum(weights) * total
    whole = np.floor(exact + 1e-9).astype(
        int
    )  # a third of 3 is 1, even if rounding makes it slightly less
    for i in np.argsort(whole - exact, kind="stable")[: total - whole.sum()]:
        whole[i] += 1
    return whole.tolist()


class Mix:
    """Prompts of several sources by weight: exact counts, interleaved, a function of the seed.

    The rows of each source are shuffled within a moving window of BUFFER prompts (the made problems
    keep their own order). The order of sources is drawn without replacement.

    Attributes:
      shares: number of prompts to draw from each source.
      read: rows read so far, by source.
      skipped: rows that were not used, by source and reason.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, float]],
        total: int,
        seed: int,
        *,
        encode: Callable[[Messages], list[int]],
        max_tokens: int,
    ) -> None:
        """Describe the mix; reads nothing yet.

        Args:
          sources: pairs of a source, see `parse_source`, and its weight.
          total: number of prompts.
          seed: fixes the choice and the order.
          encode: messages to prompt ids.
          max_tokens: prompts with more ids are skipped.

        Raises:
          UserError: for a source or weight that is refused.
        """
        names = [name for name, _ in sources]
        if twice := [name for name, count in collections.Counter(names).items() if count > 1]:
            raise UserError(f"the source {twice[0]!r} is given twice: give it once, with a weight")
        self._sources = {name: parse_source(name) for name in names}
        self.shares = dict(zip(names, shares([w for _, w in sources], total), strict=True))
        self.read: collections.Counter[str] = collections.Counter()
        self.skipped: dict[str, collections.Counter[str]] = {
            name: collections.Counter() for name in names
        }
        self._seed, self._encode, self._max_tokens = seed, encode, max_tokens

    def __iter__(self) -> Iterator[Prompt]:
        """Yield the prompts.

        Raises:
          UserError: when a source cannot be read, or has fewer prompts than its share.
        """
        rng = np.random.default_rng((self._seed, len(self.shares)))
        counts = list(self.shares.values())
        order = rng.permutation(np.repeat(np.arange(len(counts), dtype=np.uint8), counts))
        streams = [self._stream(name, i) for i, name in enumerate(self.shares)]
        with contextlib.ExitStack() as stack:
            for stream in streams:
                stack.callback(stream.close)  # close a hub's connection here, not at exit
            for i in order:
                yield next(streams[i])

    def _stream(self, name: str, number: int) -> Any:
        """Yield the share of one source, in order; raise if it has fewer prompts."""
        source, share = self._sources[name], self.shares[name]
        rng = np.random.default_rng((self._seed, number + 1, 1))
        size = 1 if source.kind == "problems" else BUFFER
        count = 0
        for prompt in itertools.islice(_shuffled(self._usable(name), rng, size), share):
            count += 1
            yield prompt
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.skipped[name].most_common())
        raise UserError(
            f"the source {name!r} has {count:,} prompts of the {share:,} requested"
            f"{f' (skipped: {reasons})' if reasons else ''}: ask for fewer, or lower its weight"
        )

    def _usable(self, name: str) -> Iterator[Prompt]:
        in_vain, endless = 0, self._sources[name].kind == "problems"
        for row in self._sources[name].rows(self._seed):
            if endless and in_vain == IN_VAIN:
                return
            self.read[name] += 1
            in_vain += 1
            try:
                messages = prompt_of(row)
                ids = self._encode(messages)
                if len(ids) > self._max_tokens:
                    raise Skip(f"over {self._max_tokens} tokens")
            except Skip as reason:
                self.skipped[name][str(reason)] += 1
                continue
            in_vain = 0
            yield Prompt(messages, ids, name)


def _shuffled(items: Iterator[Any], rng: np.random.Generator, size: int) -> Iterator[Any]:
    """Shuffle a stream within a window: yield a random element, put the next one in its place."""
    window = list(itertools.islice(items, size))
    for item in items:
        i = rng.integers(size)
        window[i], item = item, window[i]
        yield item
    yield from (window[i] for i in rng.permutation(len(window)))
