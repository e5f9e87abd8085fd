"""Train the diffusion view of a frozen base: `python -m train.main --config configs/tiny.py`.

Self-distils responses from the base, trains the view on them, exports an Orthrus checkpoint.
"""

import dataclasses
import itertools
import json
import pathlib
import time
from typing import Any

import numpy as np

from orthrus_jax import checkpoint, params
from orthrus_jax.generate import Generator
from orthrus_jax.tokenizer import encode, load_tokenizer
from train import command, trainer
from train.data import batches, pack, stack
from train.distill import distill
from train.problems import problems


def main(config: Any, overwrite: bool) -> None:
    """Run the stages; leave `model/`, `responses.jsonl`, `train.jsonl`, `train.json` in the run."""
    run = pathlib.Path(config.run)
    checkpoint.check_target(run / "model", overwrite=overwrite)
    base = checkpoint.load_checkpoint(config.base, dtype="float32")
    sizes = dataclasses.replace(base.config, block_size=config.train.block_size)
    frozen, diffusion = params.split(base.params)
    generator = Generator(sizes, base.params, load_tokenizer(base.directory))
    run.mkdir(parents=True, exist_ok=True)

    clock = _Clock()
    conversations = distill(
        generator,
        [p.question for p in problems("train", config.seed + 2, config.distill.problems)],
        max_new_tokens=config.distill.max_new_tokens,
        batch_size=config.distill.batch_size,
        out=run / "responses.jsonl",
    )
    clock.lap("distill")
    pad = generator.tokenizer.pad_token_id
    rows = stack(pack(conversations, config.train.row_length, pad=pad))
    diffusion = trainer.fit(
        config.train,
        generator.engine.model,
        frozen,
        diffusion,
        batches(rows, config.train.batch_size, config.seed),
        run / "train.jsonl",
        _held_out_acceptance(generator, frozen, config),
    )
    clock.lap("train")
    checkpoint.save_checkpoint(
        run / "model",
        sizes,
        params.merge(frozen, diffusion),
        tokenizer_from=base.directory,
        overwrite=overwrite,
    )
    clock.lap("export")
    stages = {
        "base_parameters": params.count(frozen),
        "trained_parameters": params.count(diffusion),
        "seconds": clock.seconds,
    }
    (run / "train.json").write_text(json.dumps(stages, indent=2) + "\n")
    print(f"Orthrus checkpoint written to {run / 'model'}")


def _held_out_acceptance(generator: Generator, frozen: params.Params, config: Any) -> Any:
    """Return a function that decodes held-out prompts with a given diffusion subtree."""
    questions = [
        p.question for p in problems("held-out", config.seed + 3, config.train.eval_prompts)
    ]
    prompts = [encode(generator.tokenizer, q, chat=True) for q in questions]

    def evaluate(diffusion: params.Params) -> dict[str, float]:
        generator.params = params.merge(frozen, diffusion)
        completions = generator.complete(
            prompts,
            max_new_tokens=config.distill.max_new_tokens,
            batch_size=len(prompts),
        )
        cycles = list(itertools.chain.from_iterable(c.accepted for c in completions))
        return {
            "acceptance_length": float(np.mean(cycles)),
            "tokens_per_forward": float(np.mean([c.tokens_per_forward for c in completions])),
        }

    return evaluate


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


if __name__ == "__main__":
    command.run(main, default="configs/tiny.py", description=__doc__ or "")
