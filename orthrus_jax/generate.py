"""Text in, text out: `python -m orthrus_jax.generate`, and the Python API behind it.

Decides how prompts become a few static shapes (buckets), so that a new prompt length compiles
nothing, and what is counted as time. Knows nothing of how a token is chosen: that is decode.py.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from orthrus_jax import decode
from orthrus_jax.checkpoint import load_checkpoint
from orthrus_jax.config import DTYPES, ModelConfig
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.model import Model, Params
from orthrus_jax.tokenizer import Tokenizer, load_tokenizer
from orthrus_jax.tokenizer import decode as decode_text
from orthrus_jax.tokenizer import encode as encode_text

MODES = ("orthrus", "ar")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One row's answer and what it took.

    Attributes:
      text: the answer without special tokens ("" when generated from ids without a tokenizer).
      tokens: its ids, an EOS included where one ended it.
      cycles: draft-verify cycles, or AR steps in mode "ar", after the prefill.
      accepted: drafts accepted in each cycle; all 0 in mode "ar".
      forwards: passes through the model: 1 prefill, then 2 a cycle (1 an AR step).
      seconds: wall-clock of the batch this row was in, prefill included, compilation excluded.
      compile_seconds: what compiling for that batch took; 0 when its shapes were seen before.
    """

    text: str
    tokens: list[int]
    cycles: int
    accepted: list[int]
    forwards: int
    seconds: float
    compile_seconds: float

    @property
    def acceptance_length(self) -> float:
        """Mean drafts accepted a cycle; the AR view's own token is not counted."""
        return float(np.mean(self.accepted)) if self.accepted else 0.0

    @property
    def tokens_per_forward(self) -> float:
        """Emitted tokens over forwards. Not a speedup: forwards differ in cost."""
        return len(self.tokens) / self.forwards

    def summary(self) -> dict[str, Any]:
        """Return the object that `--json` prints."""
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "token_ids": self.tokens,
            "acceptance_length": self.acceptance_length,
            "tokens_per_forward": self.tokens_per_forward,
            "cycles": self.cycles,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.tokens)} tokens | {len(self.tokens) / self.seconds:.1f} tokens/s | "
            f"acceptance length {self.acceptance_length:.2f} | "
            f"{self.tokens_per_forward:.2f} tokens per forward | "
            f"compile {self.compile_seconds:.1f} s"
        )


class Generator:
    """A loaded model that answers prompts; programs compile once a shape bucket and are kept.

    `trained` is False where the diffusion view is a mere copy: exact all the same, but slow.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer = None,
        *,
        trained: bool = True,
    ) -> None:
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self.trained = trained
        self.model = Model(config)
        self._programs: dict[tuple, Any] = {}

    def generate(
        self,
        prompts: Sequence[str],
        *,
        mode: str = "orthrus",
        max_new_tokens: int = 256,
        chat: bool = True,
        thinking: bool = False,
        batch_size: int = 1,
        block_size: int | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Answer each prompt greedily; both modes give the same text.

        Args:
          prompts: user messages, or plain text with `chat=False`.
          mode: "orthrus" (draft and verify) or "ar" (one token a forward, the baseline).
          max_new_tokens: tokens an answer may have, EOS included.
          chat: wrap each prompt in the tokenizer's chat template.
          thinking: let the template open a thinking part.
          batch_size: prompts decoded together.
          block_size: rows of a block; None is the trained K. Every value gives the same text.
          progress: show a bar on standard error.

        Raises:
          UserError: for an empty prompt, one that does not fit, or a bad argument.
        """
        if self.tokenizer is None:
            raise UserError("this model was loaded without a tokenizer: use complete() with ids")
        ids = [encode_text(self.tokenizer, p, chat=chat, thinking=thinking) for p in prompts]
        return self.complete(
            ids,
            mode=mode,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            block_size=block_size,
            progress=progress,
        )

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        mode: str = "orthrus",
        max_new_tokens: int = 256,
        batch_size: int = 1,
        block_size: int | None = None,
        progress: bool = False,
    ) -> list[Completion]:
        """Do what `generate` does, from prompt ids."""
        self._check(prompts, mode, max_new_tokens, block_size)
        completions: list[Completion] = []
        with tqdm(total=len(prompts), desc=mode, unit="prompt", disable=not progress) as bar:
            for i in range(0, len(prompts), batch_size):
                batch = prompts[i : i + batch_size]
                completions += self._batch(batch, mode, max_new_tokens, batch_size, block_size)
                bar.update(len(batch))
        return completions

    def _check(
        self,
        prompts: Sequence[Sequence[int]],
        mode: str,
        max_new_tokens: int,
        block_size: int | None,
    ) -> None:
        config = self.config
        if mode not in MODES:
            raise UserError(f"mode={mode!r} is not one of {', '.join(MODES)}")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if mode == "orthrus" and config.mask_token_id is None:
            raise UserError("config.json names no mask_token_id, which drafting needs: use mode ar")
        if block_size is not None and not 2 <= block_size <= config.block_size:
            raise UserError(f"block_size={block_size} must be from 2 to {config.block_size}")
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i} is empty: give at least one token")
            if len(prompt) + max_new_tokens > config.max_position_embeddings:
                raise UserError(
                    f"prompt {i} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} "
                    f"that is over the model's {config.max_position_embeddings} positions"
                )

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        mode: str,
        max_new_tokens: int,
        rows: int,
        block_size: int | None,
    ) -> list[Completion]:
        """Decode up to `rows` prompts as one batch; missing rows are filled and done at once."""
        longest = max(len(p) for p in prompts)
        padded, width = bucket(longest), bucket(max_new_tokens)
        slots = bucket(padded + width + self.config.block_size)
        ids = np.zeros((rows, padded), np.int32)
        lengths, budget = np.ones(rows, np.int32), np.zeros(rows, np.int32)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)], lengths[i], budget[i] = prompt, len(prompt), max_new_tokens
        eos = jnp.array(self.config.eos_token_ids, jnp.int32)

        start = time.perf_counter()
        arguments = [jnp.array(x) for x in (ids, lengths, budget)]
        prefill = self._compiled(decode.prefill, *arguments, eos, slots=slots, max_new_tokens=width)
        if mode == "ar":
            loop = self._compiled(decode.ar_decode, prefill.out_info, eos)
        else:
            loop = self._compiled(
                decode.orthrus_decode, prefill.out_info, eos, block_size=block_size
            )
        compiled = time.perf_counter()
        state = loop(self.params, prefill(self.params, *arguments, eos), eos)
        result = jax.device_get((state.tokens, state.count, state.cycles, state.accepted))
        seconds = time.perf_counter() - compiled
        rows_done = list(zip(*result, strict=True))[: len(prompts)]
        return [self._completion(row, mode, seconds, compiled - start) for row in rows_done]

    def _completion(
        self, row: tuple[np.ndarray, ...], mode: str, seconds: float, compile_seconds: float
    ) -> Completion:
        tokens, count, cycles, accepted = row
        ids, n = tokens[:count].tolist(), int(cycles)
        return Completion(
            text="" if self.tokenizer is None else decode_text(self.tokenizer, ids),
            tokens=ids,
            cycles=n,
            accepted=accepted[:n].tolist(),
            forwards=1 + (2 * n if mode == "orthrus" else n),
            seconds=seconds,
            compile_seconds=compile_seconds,
        )

    def _compiled(self, function: Any, *arguments: Any, **static: Any) -> Any:
        """Compile function(model, params, *arguments, **static) ahead of time, once a shape."""
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(arguments))
        key = (function, shapes, *static.items())
        if key not in self._programs:
            lowered = function.lower(self.model, self.params, *arguments, **static)
            self._programs[key] = lowered.compile()
        return self._programs[key]


def bucket(n: int) -> int:
    """Return the smallest of 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, ... that holds n.

    Four steps an octave keep padding under a quarter and the number of programs logarithmic.
    """
    if n <= 64:
        return 64
    step = 1 << ((n - 1).bit_length() - 3)
    return -(-n // step) * step


def load(source: str | pathlib.Path, *, dtype: str | None = None) -> Generator:
    """Load a Qwen3 or Orthrus checkpoint, from a directory or a hub id, with its tokenizer.

    A plain Qwen3 gets a diffusion view that copies its attention: exact, and slow until trained.

    Args:
      source: directory or "owner/name".
      dtype: float32, bfloat16 or float16; None keeps the checkpoint's.

    Raises:
      UserError: naming what is missing or broken.
    """
    checkpoint = load_checkpoint(source, dtype=dtype)
    tokenizer = load_tokenizer(checkpoint.directory)
    return Generator(checkpoint.config, checkpoint.params, tokenizer, trained=checkpoint.trained)


def _read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompts is None:
        return [sys.stdin.read() if args.prompt == "-" else args.prompt]
    path = pathlib.Path(args.prompts)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(
                f'{path}:{number} is not a JSON object with a "prompt", like {{"prompt": "Hi"}}'
            ) from None
    if not prompts:
        raise UserError(f"--prompts {path} holds no prompt")
    return prompts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m orthrus_jax.generate",
        description="Generate text with exact parallel decoding, or plain AR decoding to compare.",
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="checkpoint or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; - reads standard input")
    source.add_argument("--prompts", metavar="FILE.jsonl", help='one {"prompt": TEXT} a line')
    parser.add_argument("--mode", choices=MODES, default="orthrus", help="default: orthrus")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wrap the prompt in the chat template",
    )
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("--json", action="store_true", help="print one JSON object a prompt")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    prompts = _read_prompts(args)
    model = load(args.model, dtype=args.dtype)
    if args.mode == "orthrus" and not model.trained:
        print(
            "note: this model's diffusion view is untrained: the text is exact, but --mode ar is "
            "faster until train.main has trained it",
            file=sys.stderr,
        )
    completions = model.generate(
        prompts,
        mode=args.mode,
        max_new_tokens=args.max_new_tokens,
        chat=args.chat,
        thinking=args.thinking,
        batch_size=args.batch_size,
        progress=len(prompts) > 1,
    )
    for completion in completions:
        if args.json:
            print(json.dumps(completion.summary(), ensure_ascii=False))
        else:
            print(f"{completion.text}\n\n{completion}")


if __name__ == "__main__":
    run_command(main)
