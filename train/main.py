"""Train the diffusion view of a frozen base: `python -m train.main --config configs/qwen3_4b.py`.

Self-distils responses from the base, trains the view on them, then the pairwise head of its drafts,
and exports an Orthrus checkpoint. The same command resumes an interrupted run.
"""

import contextlib
import itertools
import json
import pathlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding

from orthrus_jax import checkpoint, sharding
from orthrus_jax.errors import UserError
from orthrus_jax.files import write_atomic
from orthrus_jax.llm import LLM
from orthrus_jax.metrics import acceptance_length
from orthrus_jax.model import Model, params
from orthrus_jax.model.pairwise import Head
from orthrus_jax.tokenizer import require_mask_token
from train import cli, distill, hosts, lock, model_card, pairwise, recipe, settings, trainer
from train.checkpoints import Checkpoints
from train.data import Loader, open_rows, write_rows
from train.log import Log
from train.recipe import Progress
from train.responses import read_responses, tokenizer_identity
from train.setup import Setup, prepare

SAMPLE = 1000  # dialogues whose answers are searched for the MASK token
HALF = re.compile(
    r"\.(model|rows|recipe\.json|train\.json|train\.jsonl|manifest\.json)\.[0-9a-f]{8}\.(tmp|old)"
)
IS_FINISHED = (
    "{run} is finished: its model was trained for {steps} steps. Give more with "
    "--config.train.steps to extend it; another --config.run, or --overwrite, starts anew"
)


def main(config: Any, overwrite: bool, change_recipe: bool = False) -> None:
    """Run the stages; write responses/, rows/, checkpoints/, best/, model/ and logs to the run.

    Args:
      config: see configs/paper.py.
      overwrite: delete the outputs of an earlier run first.
      change_recipe: resume a run although its configuration has changed.

    Raises:
      UserError: for a bad configuration, base or source, or a run of another recipe.
      KeyboardInterrupt: on Ctrl-C, after saving what is trained.
    """
    settings.check(config, "distributed")
    hosts.begin(config.distributed)
    setup, run = prepare(config), pathlib.Path(config.run)
    with lock.held(run):
        progress = _begin(run, config, overwrite, change_recipe)
        if progress is Progress.FINISHED:
            print(IS_FINISHED.format(run=run, steps=config.train.steps))
            return
        clock = _Clock()
        responses = pathlib.Path(config.responses or distill.ensure_responses(config))
        clock.lap("distill")
        setup = _with_mask_token(setup, responses)
        loader = _loader(config, setup, responses, progress is Progress.NEW or change_recipe)
        clock.lap("pack")
        optimizer = trainer.adamw(
            config.train.learning_rate, config.train.steps, config.train.warmup
        )
        with contextlib.closing(_saver(config, setup)) as saver:
            frozen, state = _start(config, setup, optimizer, saver, loader, change_recipe)
            hosts.on_first_host(lambda: recipe.write(run, config))
            evaluate = held_out(config, setup, frozen)
            trained = _train(config, setup, optimizer, saver, loader, frozen, state, evaluate)
        if trained is None:
            return
        clock.lap("train")
        view = pairwise.TrainedView(Model(setup.sizes, setup.mesh), frozen, trained.diffusion)
        rows, step = open_rows(run / "rows"), int(trained.step)
        head = pairwise.train_head(config, view, rows, evaluate, step)
        clock.lap("head")
        _export(config, setup, frozen, trained.diffusion, head)
        clock.lap("export")
        hosts.on_first_host(lambda: _finish(config, setup, clock.seconds))


def _begin(run: pathlib.Path, config: Any, overwrite: bool, change: bool) -> Progress:
    """Say how far the run has come; delete what it left, with `overwrite`."""
    own = (run / recipe.RECIPE).exists()  # so is the model: this run exported it
    checkpoint.check_target(run / "model", overwrite=overwrite or own)
    progress = Progress.NEW if overwrite else recipe.progress(run, config, change=change)
    hosts.wait()  # no host writes before all have read
    if overwrite:
        hosts.on_first_host(lambda: _delete_outputs(run, keep_responses=bool(config.responses)))
    hosts.on_first_host(lambda: _delete_halves(run))
    return progress


def _with_mask_token(setup: Setup, responses: pathlib.Path) -> Setup:
    """Choose the MASK token, where the base names none, among those that no answer uses."""
    dialogues = itertools.islice(read_responses(responses, setup.tokenizer), SAMPLE)

    def answers() -> Iterator[int]:
        for dialogue in dialogues:
            ids, is_answer = dialogue.arrays()
            yield from ids[is_answer].tolist()

    sizes = require_mask_token(setup.sizes, setup.tokenizer, answers=answers())
    return setup._replace(sizes=sizes)


def _loader(config: Any, setup: Setup, responses: pathlib.Path, repack: bool) -> Loader:
    """Pack the responses to rows, once, and load them; `repack` replaces rows of another recipe."""
    dialogues = read_responses(responses, setup.tokenizer)
    tokenizer = tokenizer_identity(setup.directory)
    rows = hosts.first_host_then_rest(
        lambda: write_rows(
            pathlib.Path(config.run) / "rows",
            dialogues,
            length=config.train.row_length,
            pad=setup.tokenizer.pad_token_id or 0,  # read by nobody: Llama 3 has no such token
            document_masks=config.train.document_masks,
            recipe={"responses": dialogues.identity, "tokenizer": tokenizer},
            overwrite=repack,
        )
    )
    host, hosts_count = jax.process_index(), jax.process_count()
    return Loader(rows, config.train.batch_size, config.seed, host, hosts_count)


def _saver(config: Any, setup: Setup) -> Checkpoints:
    t = config.train
    identity = {
        "base": distill.model_identity(setup.directory)["weights"],
        "train_o_proj": t.train_o_proj,
        "stack_layers": t.stack_layers,
    }
    return Checkpoints(pathlib.Path(config.run), identity, keep=t.keep)


def _start(
    config: Any,
    setup: Setup,
    optimizer: optax.GradientTransformation,
    saver: Checkpoints,
    loader: Loader,
    change: bool,
) -> tuple[params.Params, trainer.TrainState]:
    """Load the base: the frozen tree, and the state of the newest checkpoint or the first one.

    Raises:
      UserError: for a checkpoint that does not fit, or has all steps of a changed recipe.
    """
    base = checkpoint.load_checkpoint(config.base, dtype=config.train.dtype, mesh=setup.mesh)
    freeze = () if config.train.train_o_proj else ("o_proj",)
    frozen, diffusion = params.split(base.params, freeze=freeze)
    del base  # from here on each weight is in memory once
    if config.train.stack_layers:
        diffusion, frozen = params.stack(diffusion), _stacked(frozen, setup.mesh)
    state = trainer.init_state(diffusion, optimizer, setup.mesh)
    restored = saver.restore(state)
    if restored is None:
        return frozen, state
    state, position = restored
    step, steps = int(state.step), config.train.steps
    if step > steps or (change and step == steps):
        raise UserError(
            f"config.train.steps={steps}: {config.run} has {step} steps already; give more, or "
            "--overwrite to start anew"
        )
    if change and not loader.continues(position):
        print("other rows or batches than before: the data begins anew")
    else:
        loader.restore(position)
    print(f"going on from step {step} in {pathlib.Path(config.run) / 'checkpoints'}")
    return frozen, state


def _train(
    config: Any,
    setup: Setup,
    optimizer: optax.GradientTransformation,
    saver: Checkpoints,
    loader: Loader,
    frozen: params.Params,
    state: trainer.TrainState,
    evaluate: Callable[[params.Params], dict[str, Any]],
) -> trainer.TrainState | None:
    """Train to the last step; None after a signal, when the state is saved."""
    run = pathlib.Path(config.run)
    model = Model(setup.sizes, setup.mesh, config.train.remat)
    with hosts.stop_on_signal() as stopping, Log(run, int(state.step)) as log:
        try:
            return trainer.fit(
                config.train, setup.objective, model, frozen, state, optimizer, loader, log.write,
                evaluate, saver=saver, stop=stopping,
            )  # fmt: skip
        except trainer.Interrupted:
            saver.wait()
            print(f"stopped and saved; the same command goes on from {run / 'checkpoints'}")
            return None


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


def held_out(
    config: Any, setup: Setup, frozen: params.Params
) -> Callable[[params.Params], dict[str, Any]]:
    """Return a function that decodes the held-out prompts with a given diffusion subtree.

    A pairwise head in the subtree, under its name, is used.
    """
    if not setup.held_out:
        return lambda diffusion: {}
    generator = LLM(setup.sizes, frozen, setup.tokenizer, mesh=setup.mesh)

    def evaluate(diffusion: params.Params) -> dict[str, Any]:
        # Layers stay stacked, and the frozen weights, already in this dtype, are not copied.
        whole = params.merge(frozen, diffusion)
        generator.params = jax.tree.map(lambda x: x.astype(generator.config.dtype), whole)
        completions = generator.complete(
            setup.held_out,
            mode="orthrus",
            max_new_tokens=config.distill.max_new_tokens,
            batch_size=min(len(setup.held_out), config.distill.batch_size),
        )
        generator.params = frozen  # free the copy
        return {
            "acceptance_length": acceptance_length(c.accepted for c in completions),
            "tokens_per_forward": float(np.mean([c.tokens_per_forward for c in completions])),
            "sample": completions[0].text[:400],
        }

    return evaluate


def _export(
    config: Any,
    setup: Setup,
    frozen: params.Params,
    diffusion: params.Params,
    head: Head | None,
) -> None:
    # Unstacked in host memory: a device may have no room for a second copy of the weights.
    whole = sharding.to_host(params.merge(frozen, diffusion))
    if not hosts.is_first():
        return
    if config.train.stack_layers:
        whole = params.unstack(whole)
    checkpoint.save_checkpoint(
        pathlib.Path(config.run) / "model",
        setup.sizes,
        whole,
        head=head,
        tokenizer_from=setup.directory,
        overwrite=True,  # checked when the run began
    )


def _finish(config: Any, setup: Setup, seconds: dict[str, float]) -> None:
    """Write the model card, and then the file that marks the run as finished."""
    run = pathlib.Path(config.run)
    model_card.write(run / "model" / "README.md", config, run)
    about = {**setup.parameters, "seconds": seconds}
    write_atomic(run / recipe.FINISHED, json.dumps(about, indent=2) + "\n")
    if weak := model_card.warning(model_card.last_record(run)):
        print(f"warning: {weak}", file=sys.stderr)
    print(f"Orthrus checkpoint written to {run / 'model'}")


def _delete_outputs(run: pathlib.Path, keep_responses: bool) -> None:
    """Delete an earlier run's outputs, except its model, which the export replaces.

    The recipe stays until training begins: it says whose the model is. Responses that the
    configuration names are no output, wherever they lie.
    """
    names = ["rows", "checkpoints", "best", "tensorboard", pairwise.FOLDER, "train.jsonl"]
    names.append(recipe.FINISHED)
    for name in names if keep_responses else ["responses", *names]:
        _delete(run / name)


def _delete_halves(run: pathlib.Path) -> None:
    """Delete what a killed process was writing, under a temporary name."""
    for folder in (run, run / "responses"):
        for path in folder.glob(".*"):
            if HALF.fullmatch(path.name):
                _delete(path)


def _delete(path: pathlib.Path) -> None:
    if path.is_dir() and not path.is_symlink():
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
