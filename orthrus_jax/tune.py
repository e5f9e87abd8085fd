"""Find the best draft length for a model on this device: `python -m orthrus_jax.tune`.

Every draft length gives the same text; which is fastest depends on what a row costs here and on how
often drafts are accepted. The answer is measured on prompts and kept beside the model, by device,
in decoding.json; `orthrus_jax.load` reads it back.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
from tqdm import tqdm

from orthrus_jax.errors import UserError, run_command
from orthrus_jax.tokenizer import encode

if TYPE_CHECKING:
    from orthrus_jax.llm import LLM

FILE = "decoding.json"
LENGTHS = (2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


def measure(
    model: "LLM", prompts: Sequence[Sequence[int]], repeats: int = 3, **options: Any
) -> dict[int, float]:
    """Tokens/s (median) by draft length, the runs of all lengths interleaved, compilation apart."""
    lengths = sorted(
        {k for k in LENGTHS if k < model.config.block_size} | {model.config.block_size}
    )
    rates: dict[int, list[float]] = {k: [] for k in lengths}
    with tqdm(total=len(lengths) * (repeats + 1), desc="tune", unit="run") as bar:
        for turn in range(repeats + 1):
            for k in lengths:
                begin = time.perf_counter()
                answers = model.complete(prompts, draft_length=k, **options)
                taken = time.perf_counter() - begin
                if turn:  # the first compiles and warms
                    rates[k].append(sum(len(a.tokens) for a in answers) / taken)
                bar.update()
    return {k: statistics.median(found) for k, found in rates.items()}


def save(directory: str | pathlib.Path, rates: dict[int, float]) -> int:
    """Write the measured rates beside the model, for this device; return the best length."""
    path = pathlib.Path(directory) / FILE
    known = _read(path)
    best = max(rates, key=rates.__getitem__)
    known[jax.devices()[0].device_kind] = {
        "draft_length": best,
        "tokens_per_second": {str(k): round(rate, 1) for k, rate in rates.items()},
    }
    path.write_text(json.dumps(known, indent=2) + "\n")
    return best


def preferred(directory: str | pathlib.Path, block_size: int) -> int | None:
    """Return the length measured for this device, or None where none was.

    Raises:
      UserError: when the file is damaged or asks for more than the trained K.
    """
    path = pathlib.Path(directory) / FILE
    found = _read(path).get(jax.devices()[0].device_kind)
    if found is None:
        return None
    length = found.get("draft_length") if isinstance(found, dict) else None
    if not isinstance(length, int) or not 2 <= length <= block_size:
        raise UserError(
            f"{path}: draft_length={length!r} must be from 2 to {block_size}; "
            "delete the file or run orthrus_jax.tune again"
        )
    return length


def _read(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it or tune again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object: delete it or tune again")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    from orthrus_jax import cli
    from orthrus_jax.cli import read_prompts
    from orthrus_jax.llm import load

    parser = argparse.ArgumentParser(prog="python -m orthrus_jax.tune", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument(
        "--prompts", required=True, metavar="FILE.jsonl", help='one {"prompt": TEXT} a line'
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    cli.add_runtime(parser)
    args = parser.parse_args(argv)
    if not pathlib.Path(args.model).is_dir():
        raise UserError(f"--model {args.model} is no directory: {FILE} is written into it")
    model = load(args.model, **cli.runtime_options(args))
    ids = [encode(model.tokenizer, text, chat=True) for text in read_prompts(args.prompts)]
    rates = measure(model, ids, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    best = save(args.model, rates)
    for length, rate in rates.items():
        print(f"draft length {length:3d}  {rate:10.1f} tokens/s{'  <- best' * (length == best)}")
    print(f"kept in {pathlib.Path(args.model) / FILE}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
