"""A run before its work: everything that can be known is checked, and nothing is written.

Reads the base's config.json and tokenizer, no weights, and draws the held-out prompts. Knows no
stage of the run.
"""

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from orthrus_jax import checkpoint, memory, runtime, sharding
from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.model import params
from orthrus_jax.model.params import DIFFUSION
from orthrus_jax.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, require_mask_token
from train import settings, trainer
from train.distill_config import DistillConfig
from train.objective import Objective, objective_of
from train.prompts import Mix, local_files
from train.responses import MANIFEST, prompt_encoder

TRAINED_BYTES = 16  # float32 each: weight, gradient, two moments


class Setup(NamedTuple):
    """The accepted configuration of a run.

    Attributes:
      sizes: of the base, with the K and dtype of training.
      directory: of the base.
      parameters: numbers of them: of the base, and of those that are trained.
      held_out: ids of the prompts that are decoded every `eval_every` steps.
    """

    objective: Objective
    mesh: Mesh | None
    sizes: ModelConfig
    directory: pathlib.Path
    tokenizer: Tokenizer
    parameters: dict[str, int]
    held_out: list[list[int]]


def prepare(config: Any) -> Setup:
    """Check a configuration against its base and this machine.

    Raises:
      UserError: for a value, base, source of held-out prompts or machine that cannot do.
    """
    parts = ("run", "base", "seed", "responses", "distributed", "mesh", "train", "head")
    settings.check(config, *parts)
    runtime.check_devices()
    t, distill = config.train, DistillConfig.of(config)
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    trainer.check_batch(t, mesh)
    if config.responses and not pathlib.Path(config.responses, MANIFEST).is_file():
        local_files(config.responses)
    directory = checkpoint.resolve(config.base)
    if directory.resolve() == pathlib.Path(config.run, "model").resolve():
        raise UserError(
            f"config.base={config.base} is where the run exports to: give another --config.run"
        )
    base = checkpoint.read_config(directory).config
    sizes = dataclasses.replace(base, block_size=t.block_size, dtype=t.dtype)
    sharding.check_divides(sizes, mesh)
    if t.row_length > sizes.max_position_embeddings:
        raise UserError(
            f"config.train.row_length={t.row_length} is over the "
            f"{sizes.max_position_embeddings} positions of {config.base}"
        )
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, sizes)
    require_mask_token(sizes, tokenizer)  # chosen after distilling, refused before
    parameters = check_memory(config.base, sizes, t.train_o_proj)
    return Setup(
        objective_of(t),
        mesh if mesh.size > 1 else None,  # one device needs no mesh
        sizes,
        directory,
        tokenizer,
        parameters,
        _held_out(config, tokenizer, distill.room(sizes)),
    )


def check_memory(base: str, sizes: ModelConfig, train_o_proj: bool) -> dict[str, int]:
    """Count the parameters of a base and of what is trained; both must fit this host's memory.

    Raises:
      UserError: with both sizes.
    """
    counts = {path: math.prod(shape) for path, shape in params.shapes(sizes).items()}
    is_trained = lambda path: DIFFUSION in path and (train_o_proj or "o_proj" not in path)
    trained = sum(count for path, count in counts.items() if is_trained(path))
    frozen = sum(counts.values()) - trained
    needed = frozen * jnp.dtype(sizes.dtype).itemsize + trained * TRAINED_BYTES
    memory.check_memory(
        needed // jax.process_count(),
        f"training {base}",
        "use more devices (config.mesh.fsdp), a smaller base, or bfloat16 (config.train.dtype)",
        jax.local_devices(),
    )
    base_count = sum(count for path, count in counts.items() if DIFFUSION not in path)
    return {"base_parameters": base_count, "trained_parameters": trained}


def _held_out(config: Any, tokenizer: Tokenizer, room: int) -> list[list[int]]:
    """Draw the held-out prompts: now, so that a source that lacks them costs no training."""
    if not config.train.eval_prompts:
        return []
    mix = Mix(
        settings.sources(config.train.eval_sources, "config.train.eval_sources"),
        config.train.eval_prompts,
        config.seed + 3,
        encode=prompt_encoder(tokenizer, thinking=False),
        max_tokens=room,
    )
    return [prompt.ids for prompt in mix]
