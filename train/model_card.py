"""The model card of an exported checkpoint: its base, recipe, data and measurements."""

import pathlib
from typing import Any

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
    """The last record of a run's log, which has its held-out acceptance; {} without a log."""
    try:
        records = [record for _, record in read_jsonl(run / "train.jsonl")]
    except (OSError, UserError):
        return {}
    return records[-1] if records else {}


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
