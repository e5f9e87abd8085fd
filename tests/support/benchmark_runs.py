"""Small benchmark runs: a checkpoint, rows of GSM8K, the command, and its figures without times."""

import json
import pathlib

import orthrus_jax
from eval import harness, records, report
from orthrus_jax.checkpoint import save_checkpoint
from tests.support.configs import tiny_config
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

TEXTS = ["How many apples are 12 and 30?", "They are 42 apples. The answer is \\boxed{42}."] * 20
TIMES = {
    *("seconds", "first_seconds", "first_token_ms"),
    *("tokens_per_second", "speedup", "speedup_range"),
}
load_anew = orthrus_jax.load  # the tests replace the name


def save_model(path: pathlib.Path) -> str:
    """A checkpoint with random weights in both views: its drafts are sometimes right."""
    config = tiny_config(
        vocab_size=400,
        num_hidden_layers=1,
        mask_token_id=399,
        eos_token_ids=(2,),
        max_position_embeddings=512,
    )
    weights = random_params(config, 3, gain=3.0)
    save_checkpoint(path, config, weights, tokenizer=small_tokenizer(TEXTS, 400))
    return str(path)


def save_rows(path: pathlib.Path, count: int = 96) -> str:
    """Rows of GSM8K, all different."""
    return write(
        path,
        [
            {"question": f"How many apples are {i} and {i % 7}?", "answer": f"#### {i + i % 7}"}
            for i in range(count)
        ],
    )


def write(path: pathlib.Path, rows) -> str:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gsm8k(directory, data, out, *more) -> dict:
    """Run the command; its numbers."""
    arguments = ["--model", directory, "--data", data, "--out", str(out), "--max-new-tokens", "24"]
    harness.main("gsm8k", [*arguments, *more])
    return json.loads((pathlib.Path(out) / report.RESULTS).read_text())


def rows_of(out) -> list[dict]:
    """The lines of a run's answers."""
    return [json.loads(line) for line in (pathlib.Path(out) / records.ANSWERS).open()]


def timeless(value):
    """Figures without times."""
    if isinstance(value, dict):
        return {name: timeless(part) for name, part in value.items() if name not in TIMES}
    return [timeless(part) for part in value] if isinstance(value, list) else value
