"""Train the diffusion view of a frozen base: `python -m train.main --config configs/qwen3_4b.py`.

Self-distils responses from the base, trains the view on them, exports an Orthrus checkpoint. The
same command resumes an interrupted run.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from orthrus_jax import checkpoint, sharding
from orthrus_jax.errors import UserError
from orthrus_jax.files import write_atomic
from orthrus_jax.llm import LLM
from orthrus_jax.metrics import acceptance_length
from orthrus_jax.model import REMAT, Model, params
from orthrus_jax.tokenizer import (
    encode_messages,
    load_tokenizer,
    require_mask_token,
    with_mask_token,
)
from train import cli, distill, hosts, model_card, trainer
from train.checkpoints import Checkpoints
from train.data import Loader, Rows, write_rows
from train.log import Log
from train.objective import check_choice, objective_of
from train.prompts import Mix
from train.responses import read_responses

RECIPE = "recipe.json"
# Values that may differ when a run is resumed: they set where it runs and what it reports, not what
# it computes.
MAY_CHANGE = ("run", "mesh", "log_every", "eval_every", "save_every", "keep", "eval_prompts",
              "remat", "stack_layers", "tensor")  # fmt: skip


def main(config: Any, overwrite: bool, change_recipe: bool = False) -> None:
    """Run the stages; write responses/, rows/, checkpoints/, best/, model/ and logs to the run.

    Args:
      config: see configs/paper.py.
      overwrite: delete the outputs of an earlier run first.
      change_recipe: resume a run although its configuration has changed.

    Raises:
      UserError: for a bad configuration, base or source, or a run of another recipe.
    """
    hosts.begin(config.distributed)
    run = pathlib.Path(config.run)
    if overwrite:
        hosts.on_first_host(lambda: _delete_outputs(run))
    checkpoint.check_target(run / "model", overwrite=overwrite)
    objective = objective_of(config.train)
    remat = check_choice("train.remat", config.train.remat, REMAT)
    mesh = _mesh(config.mesh)
    trainer.check_batch(config.train, mesh)
    hosts.first_host_then_rest(lambda: _check_recipe(run, config, change_recipe))

    clock = _Clock()
    _check_mask_token(config.base)  # refused before hours of distillation
    responses = pathlib.Path(config.responses or distill.ensure_responses(config))
    clock.lap("distill")
    base = checkpoint.load_checkpoint(config.base, dtype=config.train.dtype, mesh=mesh)
    tokenizer = load_tokenizer(base.directory)
    sizes = dataclasses.replace(
        with_mask_token(base.config, tokenizer, answers=_sample(responses, tokenizer)),
        block_size=config.train.block_size,
    )
    freeze = () if config.train.train_o_proj else ("o_proj",)
    frozen, diffusion = params.split(base.params, freeze=freeze)
    source, base_parameters = base.directory, params.count(params.split(base.params)[0])
    del base  # from here on each weight is in memory once
    rows = hosts.first_host_then_rest(lambda: _rows(config, responses, tokenizer, overwrite))
    clock.lap("pack")

    model = Model(sizes, mesh, remat)
    if config.train.stack_layers:
        diffusion, frozen = params.stack(diffusion), _stacked(frozen, mesh)
    t = config.train
    optimizer = trainer.adamw(t.learning_rate, t.steps, t.warmup)
    state = trainer.init_state(diffusion, optimizer, mesh)
    del diffusion
    loader = Loader(rows, t.batch_size, config.seed, jax.process_index(), jax.process_count())
    identity = {"base": distill.model_identity(source)["weights"]}
    saver = Checkpoints(run, identity, keep=t.keep)
    evaluate = _held_out(LLM(sizes, frozen, tokenizer, mesh=mesh), tokenizer, frozen, config)
    if restored := saver.restore(state):
        state, position = restored
        loader.restore(position)
        print(f"going on from step {int(state.step)} in {run / 'checkpoints'}")
    with hosts.stop_on_signal() as stopping, Log(run, int(state.step)) as log:
        try:
            state = trainer.fit(
                t, objective, model, frozen, state, optimizer, loader, log.write, evaluate,
                saver=saver, stop=stopping,
            )  # fmt: skip
        except trainer.Interrupted:
            saver.close()
            print(f"stopped; the same command goes on from {run / 'checkpoints'}")
            return
    clock.lap("train")
    saver.wait()
    _export(config, source, sizes, frozen, state.diffusion, overwrite)
    saver.close()
    clock.lap("export")
    if not hosts.is_first():
        return
    stages = {
        "base_parameters": base_parameters,
        "trained_parameters": params.count(state.diffusion),
        "seconds": clock.seconds,
    }
    write_atomic(run / "train.json", json.dumps(stages, indent=2) + "\n")
    model_card.write(run / "model" / "README.md", config, run)
    print(f"Orthrus checkpoint written to {run / 'model'}")


def _check_mask_token(base: str) -> None:
    directory = checkpoint.resolve(base)
    require_mask_token(checkpoint.read_config(directory).config, load_tokenizer(directory))


def _sample(responses: pathlib.Path, tokenizer: Any) -> Iterator[int]:
    """Ids of the first thousand answers."""
    for dialogue in itertools.islice(read_responses(responses, tokenizer), 1000):
        ids, is_answer = dialogue.arrays()
        yield from ids[is_answer].tolist()


def _mesh(sizes: Any) -> Any:
    """The mesh of the configuration; None for one device, which needs none."""
    mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    return mesh if mesh.size > 1 else None


def _check_recipe(run: pathlib.Path, config: Any, change: bool) -> None:
    """Write the recipe to the run, or refuse a changed one unless `change`."""
    now = _flat(json.loads(config.to_json_best_effort()))
    path = run / RECIPE
    if path.exists() and not change:
        before = json.loads(path.read_text())
        for name in sorted(before.keys() | now.keys()):
            if name.split(".")[-1] in MAY_CHANGE or name.split(".")[0] in MAY_CHANGE:
                continue
            if before.get(name) != now.get(name):
                raise UserError(
                    f"{run} was begun with {name}={before.get(name)!r}, now {now.get(name)!r}: "
                    "give another --config.run, --change_recipe to go on with the new recipe, or "
                    "--overwrite to start anew"
                )
    run.mkdir(parents=True, exist_ok=True)
    if hosts.is_first():
        write_atomic(path, json.dumps(now, indent=2, sort_keys=True) + "\n")


def _flat(tree: dict[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{at}{name}.")
        else:
            flat[at + name] = value
    return flat


def _rows(config: Any, responses: pathlib.Path, tokenizer: Any, overwrite: bool) -> Rows:
    dialogues = read_responses(responses, tokenizer)
    return write_rows(
        pathlib.Path(config.run) / "rows",
        dialogues,
        length=config.train.row_length,
        pad=tokenizer.pad_token_id or 0,  # read by nobody: Llama 3 has no such token
        document_masks=config.train.document_masks,
        recipe={"responses": dialogues.identity},
        overwrite=overwrite,
    )


def _stacked(tree: params.Params, mesh: Any) -> params.Params:
    """Stack the layers on the devices, one weight at a time; free each layer's own copy."""

    def join(path: Any, leaves: Any) -> jax.Array:
        where = None
        if mesh is not None:
            where = NamedSharding(
                mesh, sharding.param_spec(path, (len(leaves), *leaves[0].shape), mesh)
            )
        whole = jax.jit(lambda *parts: jnp.stack(parts), out_shardings=where)(*leaves)
        for leaf in leaves:
            leaf.delete()
        return whole

    return params.stack(tree, join)


def _held_out(
    generator: LLM, tokenizer: Any, frozen: params.Params, config: Any
) -> Callable[[params.Params], dict[str, Any]]:
    """Return a function that decodes held-out prompts with a given diffusion subtree."""
    if not config.train.eval_prompts:
        return lambda diffusion: {}
    mix = Mix(
        config.train.eval_sources,
        config.train.eval_prompts,
        config.seed + 3,
        encode=lambda messages: encode_messages(tokenizer, messages),
        max_tokens=config.distill.max_prompt_tokens,
    )
    prompts = [prompt.ids for prompt in mix]

    def evaluate(diffusion: params.Params) -> dict[str, Any]:
        # Layers stay stacked, and the frozen weights, already in this dtype, are not copied.
        whole = params.merge(frozen, diffusion)
        generator.params = jax.tree.map(lambda x: x.astype(generator.config.dtype), whole)
        completions = generator.complete(
            prompts,
            max_new_tokens=config.distill.max_new_tokens,
            batch_size=min(len(prompts), config.distill.batch_size),
        )
        generator.params = frozen  # free the copy
        return {
            "acceptance_length": acceptance_length(c.accepted for c in completions),
            "tokens_per_forward": float(np.mean([c.tokens_per_forward for c in completions])),
            "sample": completions[0].text[:400],
        }

    return evaluate


def _export(
    config: Any, source: pathlib.Path, sizes: Any, frozen: Any, diffusion: Any, overwrite: bool
) -> None:
    # Unstacked in host memory: a device may have no room for a second copy of the weights.
    whole = sharding.to_host(params.merge(frozen, diffusion))
    if not hosts.is_first():
        return
    if config.train.stack_layers:
        whole = params.unstack(whole)
    checkpoint.save_checkpoint(
        pathlib.Path(config.run) / "model",
        sizes,
        whole,
        tokenizer_from=source,
        overwrite=overwrite,
    )


def _delete_outputs(run: pathlib.Path) -> None:
    """Delete an earlier run's outputs, except its model: the export replaces that."""
    for name in ("responses", "rows", "checkpoints", "best", RECIPE, "train.jsonl"):
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


if __name__ == "__main__":
    cli.run(
        main,
        default="configs/tiny.py",
        description=__doc__ or "",
        switches=cli.OVERWRITE
        | {"change_recipe": "continue a run although its configuration has changed"},
    )
