"""Generate text: `python -m orthrus_jax.generate --model DIR_OR_ID --prompt TEXT`.

Decides which flags fit each other and what is printed. Knows no decoding: llm.py answers.
"""

import argparse
import json
from collections.abc import Sequence

from orthrus_jax.cli import (
    add_kv_cache,
    add_mode,
    add_runtime,
    add_sampling,
    chosen_decoding,
    decoding_of,
    print_pieces,
    read_stdin,
    runtime_options,
    sampling_options,
)
from orthrus_jax.engine import SamplingParams
from orthrus_jax.errors import UserError, program_name, run_command
from orthrus_jax.files import read_prompts
from orthrus_jax.llm import load
from orthrus_jax.values import check_whole


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program_name("generate"),
        description="Generate text with exact parallel decoding, or plain AR decoding to compare.",
    )
    parser.add_argument("--model", required=True, metavar="DIR_OR_ID", help="checkpoint or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; - reads standard input")
    source.add_argument("--prompts", metavar="FILE.jsonl", help='one {"prompt": TEXT} per line')
    add_mode(parser)
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="wrap the prompt in the chat template",
    )
    parser.add_argument("--thinking", action="store_true", help="let the model think first")
    add_sampling(parser)
    parser.add_argument(
        "--n", type=int, default=1, metavar="N", help="samples per prompt; default: 1"
    )
    parser.add_argument("--logprobs", action="store_true", help="with --json: log p of each token")
    add_runtime(parser)
    add_kv_cache(parser)
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="answers decoded together; default: n"
    )
    parser.add_argument("--stream", action="store_true", help="print text as it grows")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per answer; tokens is the number of its token_ids",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.stream and (args.json or args.n > 1):
        parser.error("--stream goes with neither --json nor --n")
    if args.logprobs and not args.json:
        raise UserError("--logprobs needs --json: the plain output has no place for them")
    decoding_of(args)  # flags that do not fit each other are refused before a model is loaded
    sampling = sampling_options(args)
    SamplingParams(**sampling, n=args.n)
    batch = args.n if args.batch_size is None else args.batch_size
    check_whole("batch_size", batch, 1)
    if args.n > batch:
        raise UserError(f"n={args.n} is over batch_size={batch}")
    if args.prompts is not None:
        prompts = read_prompts(args.prompts)
    else:
        prompts = [read_stdin() if args.prompt == "-" else args.prompt]
    model = load(args.model, **runtime_options(args))
    options = sampling | {"strategy": chosen_decoding(args, model, batch)}
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
