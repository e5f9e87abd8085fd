"""The model card of an exported checkpoint: its base, recipe, data and measurements."""

import pathlib
from typing import Any

from orthrus_jax.checkpoint import HEAD_FILE
from orthrus_jax.errors import UserError
from orthrus_jax.files import read_jsonl, write_atomic
from train.responses import MANIFEST

CARD = """---
library_name: orthrus-jax
base_model: {base}
tags: [orthrus, speculative-decoding, jax]
---

# {name}: an Orthrus of {base}

The base's weights, unchanged, with a diffusion attention view beside each attention layer (arXiv
2605.12825). The view drafts {drafts} tokens in one pass, and the base verifies them in a second.
The text equals the base's: in float32 token for token, in bfloat16 up to near-ties.

    python -m orthrus_jax.generate --model {name} --prompt "..."

## Measured while training

{measured}

## Recipe

{recipe}

## Data

{data}
"""


def last_record(run: pathlib.Path) -> dict[str, Any]:
    """The last step's record in a run's log, with its held-out acceptance; {} without a log."""
    return next((r for r in reversed(_records(run)) if "loss" in r), {})


def _records(run: pathlib.Path) -> list[dict[str, Any]]:
    try:
        return [record for _, record in read_jsonl(run / "train.jsonl")]
    except (OSError, UserError):
        return []


def _head_line(path: pathlib.Path, config: Any, run: pathlib.Path) -> list[str]:
    """What the exported pairwise head does, if there is one and it was measured."""
    record = next((r for r in reversed(_records(run)) if "pairwise_acceptance_length" in r), None)
    if record is None or not (path.parent / HEAD_FILE).exists():
        return []
    return [
        f"- the same with the pairwise head (rank {config.head.rank}, {config.head.kind}; on "
        "unless a strategy turns it off): acceptance length "
        f"{record['pairwise_acceptance_length']:.2f}, "
        f"{record['pairwise_tokens_per_forward']:.2f} tokens per forward"
    ]


def warning(record: dict[str, Any]) -> str | None:
    """A word about a view whose drafts do not pay for the forward that makes them."""
    accepted = record.get("acceptance_length", record.get("expected_acceptance"))
    if accepted is None or accepted >= 1:
        return None
    return (
        f"the view is hardly trained: {accepted:.2f} drafts per cycle are accepted, and below 1 a "
        "cycle of two forwards is slower than two of AR decoding; train longer, or with another "
        "train.learning_rate"
    )


def write(path: pathlib.Path, config: Any, run: pathlib.Path) -> None:
    """Write the card from the run's configuration, log and data manifest."""
    last = last_record(run)
    lines = [f"- training loss at step {last['step']}: {last['loss']:.4f}"] if last else []
    if "acceptance_length" in last:
        lines.append(
            f"- decoding {config.train.eval_prompts} held-out prompts greedily: acceptance length "
            f"{last['acceptance_length']:.2f} of {config.train.block_size - 1} drafts per cycle, "
            f"{last['tokens_per_forward']:.2f} tokens per forward (mean over prompts)"
        )
    lines += _head_line(path, config, run)
    if "tokens_per_second" in last:
        lines.append(f"- {last['tokens_per_second']:.0f} training tokens/s")
    if weak := warning(last):
        lines.append(f"- **{weak}**")
    manifest = run / "responses" / MANIFEST
    data = f"Responses read from {config.responses}."
    if manifest.exists():
        data = "    " + manifest.read_text().strip().replace("\n", "\n    ")
    recipe = "    " + config.train.to_json(indent=2).replace("\n", "\n    ")
    write_atomic(
        path,
        CARD.format(
            base=config.base,
            name=path.parent.name,
            drafts=config.train.block_size - 1,
            measured="\n".join(lines),
            recipe=recipe,
            data=data,
        ),
    )
