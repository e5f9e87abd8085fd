"""Text in, text out: `python -m orthrus_jax.generate`, and the Python API behind it.

Chat template, sampling options, streaming and statistics around engine.py, which works on ids.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import sys
from collections.abc import Generator as PythonGenerator
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from orthrus_jax import machine, planner
from orthrus_jax.checkpoint import load_checkpoint
from orthrus_jax.config import ModelConfig
from orthrus_jax.engine import MODES, Answer, Engine, Memory, Plan, Request
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.model import Params
from orthrus_jax.options import add_sampling, decoding_options, read_prompts, spend_rows
from orthrus_jax.planner import Calibration
from orthrus_jax.sampling import Rule, SamplingParams
from orthrus_jax.tokenizer import Tokenizer, load_tokenizer
from orthrus_jax.tokenizer import decode as decode_text
from orthrus_jax.tokenizer import encode as encode_text


@dataclasses.dataclass(frozen=True)
class Completion:
    """One row's answer and what it took.

    Attributes:
      text: the answer without special tokens and stop string ("" without a tokenizer).
      tokens: its ids, an end token included where one ended it, or the stop string's.
      finish_reason: "stop" at an end token or a stop string, "length" at the budget.
      cycles: draft-verify cycles, or AR steps in mode "ar", after the prefill.
      accepted: drafts accepted in each cycle; all 0 in mode "ar".
      forwards: passes through the model: 1 prefill, then 2 a cycle; 1 an AR step or a cycle of one
        forward.
      seconds: wall-clock from prefill to end, with the batch it was in, compilation excluded.
      compile_seconds: what was compiled meanwhile; 0 when all shapes were seen before.
      logprobs: log p of each token under the base model, where asked for.
      prompt, sample: the place of its prompt in the call, and which of the prompt's n samples.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    cycles: int
    accepted: list[int]
    forwards: int
    seconds: float
    compile_seconds: float
    logprobs: list[float] | None = None
    prompt: int = 0
    sample: int = 0

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
        extra = {} if self.logprobs is None else {"logprobs": self.logprobs}
        return {
            "text": self.text,
            "tokens": len(self.tokens),
            "token_ids": self.tokens,
            "finish_reason": self.finish_reason,
            "prompt": self.prompt,
            "sample": self.sample,
            "acceptance_length": self.acceptance_length,
            "tokens_per_forward": self.tokens_per_forward,
            "cycles": self.cycles,
            "seconds": self.seconds,
            "compile_seconds": self.compile_seconds,
            **extra,
        }

    def __str__(self) -> str:
        return (
            f"{len(self.tokens)} tokens | {len(self.tokens) / self.seconds:.1f} tokens/s | "
            f"acceptance length {self.acceptance_length:.2f} | "
            f"{self.tokens_per_forward:.2f} tokens per forward | "
            f"compile {self.compile_seconds:.1f} s"
        )


Pieces = PythonGenerator[str, None, Completion]  # text as it grows; returns the Completion


class Generator:
    """A loaded model that answers prompts; programs compile once a shape bucket and are kept.

    `trained` is False where the diffusion view is a mere copy: exact all the same, but slow.
    `draft_length` is what a call that names none drafts with; None is the trained K. `mesh` is
    what the parameters lie on, if on several devices. `calibration` is what `plan` goes by, and
    says how far the drafting view's confidence is to be trusted.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer = None,
        *,
        trained: bool = True,
        draft_length: int | None = None,
        mesh: Mesh | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        trust = 1.0 if calibration is None else calibration.trust
        self.engine = Engine(config, params, tokenizer, mesh, trust)
        self.config, self.tokenizer, self.trained = config, tokenizer, trained
        self.draft_length, self.calibration = draft_length, calibration

    @property
    def params(self) -> Params:
        """Both views' parameters; may be replaced by others of the same shapes."""
        return self.engine.params

    @params.setter
    def params(self, params: Params) -> None:
        self.engine.params = params

    def plan(self, rows: int, batch_size: int = 1) -> planner.Choice:
        """How to spend at most `rows` rows a forward, by eval.calibrate's figures if there are any.

        `model.generate(prompts, **model.plan(160).split.options)`.
        """
        return planner.choose(self.calibration, rows, batch_size, self.config.block_size)

    def generate(
        self,
        prompts: Sequence[str],
        sampling: SamplingParams | None = None,
        *,
        chat: bool = True,
        thinking: bool = False,
        **options: Any,
    ) -> list[Completion]:
        """Answer each prompt; greedy unless `sampling` says otherwise.

        Args:
          prompts: user messages, or plain text with `chat=False`.
          sampling: how tokens are chosen and when answers end.
          chat: wrap each prompt in the tokenizer's chat template.
          thinking: let the template open a thinking part.
          options: those of `complete`.

        Raises:
          UserError: for an empty prompt, one that does not fit, or a bad argument.
        """
        if self.tokenizer is None:
            raise UserError("this model was loaded without a tokenizer: use complete() with ids")
        ids = [encode_text(self.tokenizer, p, chat=chat, thinking=thinking) for p in prompts]
        return self.complete(ids, sampling, **options)

    def complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | None = None,
        *,
        mode: str = "orthrus",
        accept: str = "rejection",
        draft_length: int | None = None,
        cycle: str = Plan.cycle,
        early_blocks: int = Plan.early_blocks,
        fresh_blocks: int = Plan.fresh_blocks,
        tree_nodes: int = Plan.tree_nodes,
        batch_size: int = 1,
        refill: bool = True,
        progress: bool = False,
        **fields: Any,
    ) -> list[Completion]:
        """Do what `generate` does, from prompt ids.

        Args:
          prompts: ids of each prompt.
          sampling: one for all prompts.
          mode: "orthrus" (draft and verify) or "ar" (one token a forward, the baseline). Greedy
            text is the same in both.
          accept: "rejection" or "coupled", when a sampled draft is accepted; see sampling.Rule.
          draft_length: rows of a draft block, the anchor included; None is `self.draft_length`.
            Every value gives an exact text.
          cycle: "paper", draft and verify in turn; "two-forward", the same, and the drafting pass
            emits too; "one-forward", which drafts while it verifies. See docs/decoding.md.
          early_blocks, fresh_blocks: with "one-forward", the blocks that each pass drafts ahead.
          tree_nodes: with "two-forward" or "one-forward", drafts of a tree; 0 verifies a chain.
          batch_size: rows decoded together; a finished row's place goes to the next prompt.
          refill: False decodes whole batches one after another.
          progress: show a bar on standard error.
          fields: of SamplingParams, in place of `sampling`: max_new_tokens=64, temperature=0.7.

        Returns:
          One completion for each prompt and sample, the samples of a prompt side by side.
        """
        sampling = _sampling(sampling, fields)
        if sampling.n > max(batch_size, 1):  # a batch_size below 1 is refused by itself
            raise UserError(f"n={sampling.n} is over batch_size={batch_size}")
        plan = self._plan(
            mode, accept, draft_length, cycle=cycle, early_blocks=early_blocks,
            fresh_blocks=fresh_blocks, tree_nodes=tree_nodes, batch_size=batch_size, refill=refill,
        )  # fmt: skip
        pairs = list(itertools.product(range(len(prompts)), range(sampling.n)))
        requests = [Request(prompts[i], sampling, sample) for i, sample in pairs]
        answers: dict[int, Answer] = {}
        with tqdm(total=len(pairs), desc=mode, unit="answer", disable=not progress) as bar:
            for event in self.engine.serve(requests, plan) if requests else ():
                if event.answer is not None:
                    answers[event.index] = event.answer
                    bar.update()
        return [self._completion(answers[j], plan, *pair) for j, pair in enumerate(pairs)]

    def stream(
        self,
        prompt: str,
        sampling: SamplingParams | None = None,
        *,
        chat: bool = True,
        thinking: bool = False,
        **options: Any,
    ) -> Pieces:
        """Answer one prompt piece by piece: whole characters, nothing at or behind a stop string.

        The pieces together are `generate`'s text. The generator returns the Completion, which
        `completion = yield from model.stream(...)` gives. Arguments are those of `generate`.
        """
        if self.tokenizer is None:
            raise UserError("this model was loaded without a tokenizer: it has no text to stream")
        ids = encode_text(self.tokenizer, prompt, chat=chat, thinking=thinking)
        return self.stream_ids(ids, sampling, **options)

    def stream_ids(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        mode: str = "orthrus",
        accept: str = "rejection",
        draft_length: int | None = None,
        cycle: str = Plan.cycle,
        early_blocks: int = Plan.early_blocks,
        fresh_blocks: int = Plan.fresh_blocks,
        tree_nodes: int = Plan.tree_nodes,
        memory: Memory | None = None,
        **fields: Any,
    ) -> Pieces:
        """Do what `stream` does, from prompt ids; with a `memory`, only what it lacks is read."""
        sampling = _sampling(sampling, fields)
        if sampling.n > 1:
            raise UserError(f"n={sampling.n}: a stream is of one sample")
        plan = self._plan(
            mode, accept, draft_length, cycle=cycle, early_blocks=early_blocks,
            fresh_blocks=fresh_blocks, tree_nodes=tree_nodes, stream=True,
        )  # fmt: skip
        request = Request(prompt, sampling)
        self.engine.check([request], plan)
        return self._pieces(request, plan, memory)

    def _pieces(self, request: Request, plan: Plan, memory: Memory | None) -> Pieces:
        for event in self.engine.serve([request], plan, memory):
            if event.text:
                yield event.text
            if event.answer is not None:
                return self._completion(event.answer, plan, 0, 0)
        raise AssertionError("a served request ends with its answer")

    def _plan(self, mode: str, accept: str, draft_length: int | None, **others: Any) -> Plan:
        rule = _member(Rule, "accept", accept)
        length = self.draft_length if draft_length is None else draft_length
        return Plan(mode, rule, draft_length=length, **others)

    def _completion(self, answer: Answer, plan: Plan, prompt: int, sample: int) -> Completion:
        text = answer.text
        if text is None:
            text = "" if self.tokenizer is None else decode_text(self.tokenizer, answer.tokens)
        return Completion(
            text=text,
            tokens=answer.tokens,
            finish_reason=answer.finish_reason,
            cycles=answer.cycles,
            accepted=answer.accepted,
            forwards=1 + plan.forwards * answer.cycles,
            seconds=answer.seconds,
            compile_seconds=answer.compile_seconds,
            logprobs=answer.logprobs,
            prompt=prompt,
            sample=sample,
        )


def _sampling(sampling: SamplingParams | None, fields: dict[str, Any]) -> SamplingParams:
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    if unknown := sorted(set(fields) - set(known)):
        raise UserError(f"unknown option {', '.join(unknown)}: sampling has {', '.join(known)}")
    if sampling is None:
        return SamplingParams(**fields)
    return dataclasses.replace(sampling, **fields)


def _member(kind: Any, name: str, value: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise UserError(
            f"{name}={value!r} is not one of {', '.join(m.value for m in kind)}"
        ) from None


def load(
    source: str | pathlib.Path, *, dtype: str | None = None, mesh: Mesh | None = None
) -> Generator:
    """Load a Qwen3 or Orthrus checkpoint, from a directory or a hub id, with its tokenizer.

    A plain Qwen3 gets a diffusion view that copies its attention: exact, and slow until trained.
    The default draft length is the one that eval.calibrate measured on this kind of device, if any.

    Args:
      source: directory or "owner/name".
      dtype: float32, bfloat16 or float16; None keeps the checkpoint's.
      mesh: devices to decode on, from sharding.make_mesh: weights go straight to their shards, the
        rows of a batch are shared out over its data axis, heads over its tensor axis.

    Raises:
      UserError: naming what is missing or broken.
    """
    checkpoint = load_checkpoint(source, dtype=dtype, mesh=mesh)
    tokenizer = load_tokenizer(checkpoint.directory)
    calibration = planner.load(checkpoint.directory)
    return Generator(
        checkpoint.config,
        checkpoint.params,
        tokenizer,
        trained=checkpoint.trained,
        draft_length=planner.preferred_draft_length(calibration, checkpoint.config.block_size),
        mesh=mesh,
        calibration=calibration,
    )


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
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wrap the prompt in the chat template",
    )
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    add_sampling(parser)
    parser.add_argument(
        "--n", type=int, default=1, metavar="N", help="samples a prompt; default: 1"
    )
    parser.add_argument("--logprobs", action="store_true", help="with --json: log p of each token")
    machine.add_options(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="answers decoded together; default: n"
    )
    parser.add_argument("--stream", action="store_true", help="print text as it grows")
    parser.add_argument("--json", action="store_true", help="print one JSON object an answer")
    return parser


def print_pieces(pieces: Pieces) -> Completion:
    """Print text as it grows; return the completion."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            return end.value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.stream and (args.json or args.n > 1):
        parser.error("--stream goes with neither --json nor --n")
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    else:
        prompts = [sys.stdin.read() if args.prompt == "-" else args.prompt]
    model = load(args.model, **machine.prepare(args))
    if args.mode == "orthrus" and not model.trained:
        print(
            "note: this model's diffusion view is untrained: the text is exact, but --mode ar is "
            "faster until train.main has trained it",
            file=sys.stderr,
        )
    batch = args.n if args.batch_size is None else args.batch_size
    spend_rows(args, model, batch)
    options = decoding_options(args)
    if args.stream:
        for prompt in prompts:
            pieces = model.stream(prompt, chat=args.chat, thinking=args.thinking, **options)
            print(f"\n\n{print_pieces(pieces)}")
        return
    completions = model.generate(
        prompts,
        chat=args.chat,
        thinking=args.thinking,
        n=args.n,
        logprobs=args.logprobs,
        batch_size=batch,
        progress=len(prompts) > 1,
        **options,
    )
    for completion in completions:
        if args.json:
            print(json.dumps(completion.summary(), ensure_ascii=False))
        else:
            print(f"{completion.text}\n\n{completion}")


if __name__ == "__main__":
    run_command(main)
