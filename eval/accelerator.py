"""Measure a GPU or TPU that is at hand for ten minutes: `python -m eval.accelerator --out DIR`.

Parts run in order of worth, each on its own: what one cannot do is written down, and the next
begins. Nothing starts after --minutes. Weights are random, so only time is measured, except in
`exact`, which compares texts in float32. Every measurement is in DIR/accelerator.json as soon as it
is made; accelerator.md there is the page. Needs no extra but what training needs for `training`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eval.accelerator_page import page
from eval.arguments import check_directory, positive, positive_list
from eval.speed import TIMED_CYCLES, copy_bandwidth, floor_ms, standing_at
from orthrus_jax import decoding
from orthrus_jax.aot.text import Text
from orthrus_jax.checkpoint import load_checkpoint
from orthrus_jax.config import PRESETS, ModelConfig
from orthrus_jax.decoding import Strategy
from orthrus_jax.drafters import first_carry, loop_of
from orthrus_jax.engine import bucket
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import write_atomic
from orthrus_jax.llm import LLM
from orthrus_jax.model import Model, params
from orthrus_jax.runtime import check_devices

TINY = ModelConfig(
    vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, block_size=8, mask_token_id=511,
)  # fmt: skip
SIZES = {name.removeprefix("qwen3-"): config for name, config in PRESETS.items()} | {"tiny": TINY}
ROWS = (1, 8, 16, 32, 64, 128, 256)
REPEATS = 5
MEMORY_SHARE = 0.85  # of the device: weights and caches; the rest is for temporaries
ASSETS = pathlib.Path(__file__).parents[1] / "assets" / "tiny-base.tar.xz"


@dataclasses.dataclass
class Session:
    """A run: what is asked, what was measured, and until when.

    Attributes:
      args: parsed.
      result: written to accelerator.json after each measurement.
      deadline: of time.monotonic(); nothing begins after it.
    """

    args: argparse.Namespace
    result: dict[str, Any]
    deadline: float

    def add(self, part: str, entry: dict[str, Any]) -> None:
        """Keep a measurement."""
        self.result.setdefault(part, []).append(entry)
        self.write()

    def write(self) -> None:
        """Write what there is."""
        out = pathlib.Path(self.args.out)
        write_atomic(out / "accelerator.json", json.dumps(self.result, indent=1) + "\n")
        write_atomic(out / "accelerator.md", page(self.result))

    def over(self) -> bool:
        """Whether the time is spent."""
        return time.monotonic() > self.deadline

    @contextlib.contextmanager
    def kept_apart(self, part: str, what: str) -> Iterator[None]:
        """Note an error of this piece of a part, and go on."""
        begin = time.monotonic()
        try:
            yield
        except Exception as error:  # whatever a new device or version refuses
            message = f"{type(error).__name__}: {error}".split("\n")[0][:300]
            self.add("failed", {"part": part, "what": what, "why": message})
        taken = time.monotonic() - begin
        print(f"{part} {what}: {taken:.1f} s", file=sys.stderr, flush=True)


def strategies(config: ModelConfig) -> dict[str, Strategy]:
    """What is timed of each cycle."""
    named = {
        "ar": Strategy("ar"),
        "paper": Strategy("orthrus"),
        "one_forward": Strategy("orthrus-1f", early_blocks=2),
        "two_forward": Strategy("orthrus-2f"),
    }
    return {name: strategy.resolve(config) for name, strategy in named.items()}


@functools.lru_cache(maxsize=1)
def model_of(size: str) -> tuple[Model, Any]:
    """A model of random weights in its own dtype; the last one is kept."""
    config = SIZES[size]
    cast = lambda x: x.astype(config.dtype)
    make = jax.jit(lambda key: jax.tree.map(cast, params.init(Model(config), key)))
    return Model(config), make(jax.random.key(0))


def slots_that_fit(model: Model, weights: Any, batch: int, contexts: Sequence[int]) -> int:
    """Cache slots for the longest of the contexts that fits the device's memory; 0 if none does."""
    stats = jax.devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit", 1 << 36) * MEMORY_SHARE
    free = limit - sum(x.nbytes for x in jax.tree.leaves(weights))
    c = model.config
    row = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * jnp.dtype(c.dtype).itemsize
    room = lambda n: bucket(n + (TIMED_CYCLES + 1) * c.block_size)
    return max((room(n) for n in contexts if 2 * batch * row * room(n) < free), default=0)


def timed(call: Callable[[], Any], make: Callable[[], Any], times: int) -> dict[str, float]:
    """Milliseconds of `times` turns of a call on fresh states: the median of some, per turn."""
    runs = []
    for turn in range(REPEATS + 1):
        state = jax.block_until_ready(make())
        begin = time.perf_counter()
        jax.block_until_ready(call(state))  # type: ignore[call-arg]
        if turn:
            runs.append((time.perf_counter() - begin) / times * 1e3)
    return {"ms": statistics.median(runs), "least_ms": min(runs), "most_ms": max(runs)}


def measure_cycles(session: Session, size: str, batch: int) -> None:
    """The AR step and all cycles of a size, one program each, at every context that fits."""
    model, weights = model_of(size)
    contexts = session.args.contexts
    slots = slots_that_fit(model, weights, batch, contexts)
    if not slots:
        raise MemoryError(f"no context of {contexts} fits {batch} sequences")
    for name, strategy in strategies(model.config).items():
        if session.over():
            return
        loop, static = loop_of(strategy, model)
        state_at = lambda context, s=strategy: standing_at(model, batch, context, slots).replace(
            drafter=first_carry(s, model, batch, slots)
        )
        begin = time.perf_counter()
        limit = jnp.int32(TIMED_CYCLES)
        program = loop.lower(model, weights, state_at(1), max_cycles=limit, **static).compile()
        compile_seconds = time.perf_counter() - begin
        which = {"size": size, "batch": batch, "cycle": name, "compile_seconds": compile_seconds}
        session.add("programs", which | shape_of(program))
        for context in contexts:
            if context + (TIMED_CYCLES + 1) * model.config.block_size > slots:
                continue
            run = functools.partial(program, weights, max_cycles=limit)
            times = timed(run, functools.partial(state_at, context), TIMED_CYCLES)
            bandwidth = session.result["bandwidth"][0]["bytes_per_second"]
            floor = floor_ms(model, weights, batch, context, bandwidth)
            where = {"size": size, "batch": batch, "context": context, "cycle": name}
            about = {"forwards": strategy.forwards, "ar_floor_ms": floor}
            session.add("cycles", where | about | times)


def shape_of(program: Any) -> dict[str, Any]:
    """Kernels of one turn, loops inside it and large copies, as the compiled text shows them."""
    text = Text(program.as_text() or "")
    body = text.loop()
    turn = text.turn(text.entry if body is None else body)
    copies = len(text.large_copies())
    return {"kernels": turn.kernels, "inner_loops": turn.inner_loops, "large_copies": copies}


def measure_rows(session: Session, size: str) -> None:
    """A verification's milliseconds by rows, and a draft's by block, one sequence."""
    model, weights = model_of(size)
    context = session.args.contexts[0]
    slots = bucket(context + max(ROWS))
    make = functools.partial(standing_at, model, 1, context, slots)
    for rows in ROWS:
        if session.over():
            return

        def verify(weights: Any, state: Any, rows: int = rows) -> Any:
            def step(_: Any, state: Any) -> Any:
                same = jnp.tile(state.anchor[:, None], (1, rows - 1))
                logits, cache, _t = decoding.verify(model, weights, state, decoding.Drafts(same))
                chosen = decoding.choose(state, logits).max(axis=1)
                return state.replace(cache=cache, anchor=chosen)

            return jax.lax.fori_loop(0, TIMED_CYCLES, step, state)

        program = jax.jit(verify, donate_argnums=1).lower(weights, make()).compile()
        times = timed(functools.partial(program, weights), make, TIMED_CYCLES)
        session.add("rows", {"size": size, "rows": rows, "context": context, **times})
    if not session.over():
        drafter = loop_of(strategies(model.config)["paper"], model)[1]["drafter"]

        def draft(weights: Any, state: Any) -> Any:
            follow = lambda _, s: s.replace(
                anchor=drafter.propose(weights, s)[0].tokens.max(axis=1)
            )
            return jax.lax.fori_loop(0, TIMED_CYCLES, follow, state)

        program = jax.jit(draft, donate_argnums=1).lower(weights, make()).compile()
        times = timed(functools.partial(program, weights), make, TIMED_CYCLES)
        block = model.config.block_size
        session.add("drafts", {"size": size, "rows": block, "context": context, **times})


def measure_bandwidth(session: Session) -> None:
    """Bytes/s of reading and writing 256 MiB."""
    session.add("bandwidth", {"bytes_per_second": copy_bandwidth()})


def measure_exactness(session: Session) -> None:
    """The demo's base in float32: every cycle's text against AR's, on 16 prompts of random ids."""
    with tempfile.TemporaryDirectory() as directory:
        with tarfile.open(ASSETS) as archive:
            archive.extractall(directory, filter="data")
        base = load_checkpoint(pathlib.Path(directory) / "base", dtype="float32")
    model = LLM(base.config, base.params)
    rng = np.random.default_rng(0)
    most = min(model.config.mask_token_id or model.config.vocab_size, model.config.vocab_size)
    prompts = [rng.integers(0, most, n).tolist() for n in rng.integers(4, 60, 16)]
    texts = {}
    for name, strategy in strategies(model.config).items():
        if session.over():
            return
        options: dict[str, Any] = {"max_new_tokens": 64, "batch_size": 4, "strategy": strategy}
        texts[name] = [answer.tokens for answer in model.complete(prompts, **options)]
        same = sum(a == b for a, b in zip(texts[name], texts["ar"], strict=True))
        session.add("exact", {"cycle": name, "prompts": len(prompts), "same_text_as_ar": same})


def measure_training(session: Session, size: str) -> None:
    """One training step of the paper's kind, 1 row of 2,048 tokens, and its MFU."""
    from train import flops, trainer  # late: its packages may be missing
    from train.data import Rows
    from train.objective import Objective

    config = SIZES[size]
    block, length = config.block_size, 2048 if size != "tiny" else 64
    objective = Objective(anchors=(length // block) or 1)
    model, weights = Model(config, None, "dots"), model_of(size)[1]
    frozen, diffusion = (params.stack(tree) for tree in params.split(weights))
    optimizer = trainer.adamw(1e-4, 100, 0.1)
    state = trainer.init_state(jax.tree.map(lambda x: x.astype(jnp.float32), diffusion), optimizer)
    tokens = jax.random.randint(jax.random.key(1), (1, 1, length), 0, config.vocab_size - 1)
    on = jnp.ones(tokens.shape, bool)
    rows = Rows(tokens, jnp.zeros(tokens.shape, jnp.int32), on, on)
    times = []
    for turn in range(4):
        begin = time.perf_counter()
        state, metrics = trainer.train_step(
            state, frozen, rows, jnp.uint32(0), model=model, optimizer=optimizer,
            objective=objective,
        )  # fmt: skip
        jax.block_until_ready((state, metrics))
        times += [time.perf_counter() - begin] if turn else []
    work = sum(flops.per_row(model, objective, length).values())
    peak = flops.PEAK.get(jax.devices()[0].device_kind)
    seconds = statistics.median(times)
    session.add("training", {"size": size, "tokens": length, "ms": seconds * 1e3,
                             "tflops": work / seconds / 1e12,
                             "mfu": work / seconds / peak if peak else None})  # fmt: skip


def count_graphs(session: Session, dump: pathlib.Path) -> None:
    """Command buffers (CUDA graphs) in the loops' bodies, from the thunks that XLA wrote down."""
    for path in sorted(dump.glob("*thunk_sequence_after_thunk_passes.txt")):
        lines = path.read_text(errors="replace").splitlines()
        count = sum("kCommandBuffer" in line for line in lines)
        session.add("graphs", {"program": path.name.split(".")[1], "command_buffers": count,
                               "loops": sum("kWhile" in line for line in lines)})  # fmt: skip


def jobs(session: Session, dump: pathlib.Path) -> list[tuple[str, str, Callable[[], None]]]:
    """Part, what of it, and how, in order of worth."""
    args = session.args
    cycles = lambda size, batch: functools.partial(measure_cycles, session, size, batch)
    first, *others = args.batches
    work: list[tuple[str, str, Callable[[], None]]] = [
        ("bandwidth", "", functools.partial(measure_bandwidth, session)),
        ("cycles", f"{args.sizes[0]} at batch {first}", cycles(args.sizes[0], first)),
        ("rows", args.sizes[0], functools.partial(measure_rows, session, args.sizes[0])),
        ("exact", "float32", functools.partial(measure_exactness, session)),
    ]
    for size in args.sizes[1:]:
        work.append(("cycles", f"{size} at batch {first}", cycles(size, first)))
    small = args.sizes[-1]
    work.append(("training", small, functools.partial(measure_training, session, small)))
    for size in args.sizes:
        for batch in others:
            work.append(("cycles", f"{size} at batch {batch}", cycles(size, batch)))
        if size != args.sizes[0]:
            work.append(("rows", size, functools.partial(measure_rows, session, size)))
    parts = ["bandwidth", *args.parts]  # the floors need it
    chosen = [job for job in work if job[0] in parts]
    return [*chosen, ("graphs", "", functools.partial(count_graphs, session, dump))]


PARTS = ("cycles", "rows", "exact", "training")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    names = lambda text: text.split(",")
    add("--out", required=True, metavar="DIR", help="for accelerator.json and accelerator.md")
    add("--sizes", type=names, default=["1.7b", "4b", "0.6b"], metavar="LIST",
        help=f"of {', '.join(SIZES)}; default: 1.7b,4b,0.6b")  # fmt: skip
    add("--batches", type=positive_list, default=[1, 8, 32], help="default: 1,8,32")
    add("--contexts", type=positive_list, default=[1024, 8192, 32_768],
        help="default: 1024,8192,32768")  # fmt: skip
    add("--parts", type=names, default=list(PARTS), metavar="LIST",
        help=f"default: {','.join(PARTS)}")  # fmt: skip
    add("--minutes", type=positive, default=9, help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = _parser().parse_args(argv)
    begin = time.monotonic()
    for flag, values, known in (("--sizes", args.sizes, SIZES), ("--parts", args.parts, PARTS)):
        if unknown := [value for value in values if value not in known]:
            raise UserError(f"{flag} names {', '.join(unknown)}: expected some of "
                            f"{', '.join(known)}")  # fmt: skip
    out = pathlib.Path(args.out)
    check_directory("--out", out)
    dump = pathlib.Path(tempfile.mkdtemp())
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re=.*decode.*"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"  # before any device
    try:
        check_devices()
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, UserError):
        dump.rmdir()
        raise
    device = jax.devices()[0]
    about = {"device": device.device_kind, "jax": jax.__version__, "argv": list(argv or sys.argv)}
    session = Session(args, {"about": about}, begin + 60 * args.minutes)
    try:
        for part, what, work in jobs(session, dump):
            if session.over() and part != "graphs":
                session.add("failed", {"part": part, "what": what, "why": "the time was spent"})
                continue
            with session.kept_apart(part, what):
                work()
    finally:
        shutil.rmtree(dump, ignore_errors=True)
    session.result["about"]["seconds"] = time.monotonic() - begin
    session.write()
    print(page(session.result))


if __name__ == "__main__":
    run_command(main)
