"""Compile a program and report it: GiB by part, fits or not, kernels, loops, copies, time.

Time is what the compiler estimates of its own program (TPU), or a sum over its kernels (GPU): never
run, and labelled so. Knows no programs by name.
"""

import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

from orthrus_jax.aot import room
from orthrus_jax.aot.chips import LAUNCH_US, Chip
from orthrus_jax.aot.programs import Program, local_bytes
from orthrus_jax.aot.text import Text, Turn

NEVER_RUN = "estimated by the compiler, never run"


def compile_report(program: Program, chip: Chip, text: str | None = None) -> dict[str, Any]:
    """Compile; GiB per device by part, whether the total fits, and what the text shows.

    A program that the compiler finds too large is reported with the compiler's own message. The
    compiled text of one that it accepts is written to the file `text`.
    """
    result: dict[str, Any] = {
        f"{name.replace(' ', '_')}_gib": local_bytes(tree) / 2**30
        for name, tree in program.parts.items()
    }
    begin, begin_cpu = time.perf_counter(), time.process_time()
    compiled = None
    try:
        compiled = program.lowered.compile()
    except Exception as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message and "Ran out of memory" not in message:
            raise
        lines = message.split("\n")
        about_memory = next((line for line in lines if "hbm" in line.lower()), lines[0])
        result |= {"fits": False, "why": about_memory.strip()[:200]}
    result["seconds"] = time.perf_counter() - begin
    result["processor_seconds"] = time.process_time() - begin_cpu  # meaningful on a busy host too
    if compiled is None:
        return result
    content = compiled.as_text() or ""
    if text is not None:
        pathlib.Path(text).write_text(content, encoding="utf-8")
    memory = compiled.memory_analysis()
    gib = lambda name: getattr(memory, f"{name}_size_in_bytes") / 2**30
    result["arguments_gib"] = gib("argument")
    result["results_gib"] = gib("output") - gib("alias")
    result["temporaries_gib"] = gib("temp")
    total = result["arguments_gib"] + result["results_gib"] + result["temporaries_gib"]
    result |= {"total_gib": total, "fits": total <= chip.gib}
    return result | read_text(program, chip, Text(content, program.trips))


def read_text(program: Program, chip: Chip, text: Text) -> dict[str, Any]:
    """What the compiled text shows: of one turn of a decoding loop, or of the whole program."""
    body = text.loop() if program.loops else None
    turn = text.turn(text.entry if body is None else body)
    result: dict[str, Any] = {"inner_loops": turn.inner_loops}
    copies = text.large_copies()
    result |= {"large_copies": len(copies), "large_copies_made": list(copies)}
    result["kernels"] = turn.kernels
    if program.forwards:
        result["kernels_per_forward"] = turn.kernels / program.forwards
        result["kernels_per_layer"] = turn.layer_kernels / program.forwards / program.layers
        result |= estimate(program, chip, turn)
    return result


def estimate(program: Program, chip: Chip, turn: Turn) -> dict[str, Any]:
    """Milliseconds of a turn, never run: on a TPU the compiler's cycles, on a GPU a sum.

    `floor_ms` is reading weights and live cache once per forward at the chip's bandwidth. A GPU's
    compiler gives no time: `estimated_ms` there is `launch_ms`, LAUNCH_US per kernel, and the
    longer of `arithmetic_ms` and `memory_ms`: the floor, and large arrays made and read again.
    """
    floor, arithmetic = program.read_bytes / chip.bandwidth, program.flops / chip.flops
    result = {"floor_ms": floor * 1e3, "arithmetic_ms": arithmetic * 1e3}
    if chip.ghz is not None:
        return result | {"estimated_ms": turn.cycles / chip.ghz / 1e6, "estimate": NEVER_RUN}
    launch = turn.kernels * LAUNCH_US / 1e6
    memory = (program.read_bytes + 2 * turn.made) / chip.bandwidth
    result |= {"memory_ms": memory * 1e3, "launch_ms": launch * 1e3}
    total = (max(memory, arithmetic) + launch) * 1e3
    return result | {"estimated_ms": total, "estimate": NEVER_RUN}


def estimate_by_depth(lower: Callable[[int], Program], layers: int, chip: Chip) -> dict[str, Any]:
    """The figures of `estimate` and the kernels of `layers` layers, from 2 and 4 of them.

    Layers are alike and not scanned: all figures grow by the same for each. `lower` gives the
    program of so many layers.
    """
    few, more = (compile_report(lower(n), chip) for n in (2, 4))
    line = lambda a, b: a + (b - a) / 2 * (layers - 2)
    times = ("estimated_ms", "floor_ms", "arithmetic_ms", "memory_ms", "launch_ms")
    result: dict[str, Any] = {n: line(few[n], more[n]) for n in times if n in few}
    result["kernels_per_forward"] = line(few["kernels_per_forward"], more["kernels_per_forward"])
    result |= {name: more[name] for name in ("kernels_per_layer", "large_copies_made")}
    result["inner_loops"] = round(line(few["inner_loops"], more["inner_loops"]))
    result["large_copies"] = round(line(few["large_copies"], more["large_copies"]))
    return result | {"estimate": f"{NEVER_RUN}, from 2 and 4 layers"}


def largest(fits: Callable[[int], bool], first: int, last: int) -> int:
    """The largest first * 2**i up to `last` that fits, 0 if none does; each try compiles once."""
    best, size = 0, first
    while size <= last and fits(size):
        best, size = size, 2 * size
    return best


def grow(name: str, lower: Callable[[int], Program], size: int, last: int, chip: Chip) -> int:
    """The largest size up to `last` that fits, doubled from a `size` that does.

    Every try takes minutes, so each is printed to stderr.

    Args:
      name: of the size, for the output.
      lower: the program of a size.
      size: known to fit.
      last: the search stops there.
      chip: whose memory it must fit.
    """

    def fits(n: int) -> bool:
        result = compile_report(lower(n), chip)
        outcome = f"{result['total_gib']:.2f} GiB" if "total_gib" in result else result["why"]
        print(f"{name} {n}: {outcome}", file=sys.stderr)
        return result["fits"]

    return largest(fits, 2 * size, last) or size


def finish(
    options: dict[str, Any], result: dict[str, Any], chip: Chip, devices: int, *, as_json: bool
) -> None:
    """Print a report, as one JSON object with the options or as text; exit with 1 if too large."""
    print(json.dumps(options | result) if as_json else "\n".join(lines_of(result, chip, devices)))
    if not result.get("fits", True):
        sys.exit(1)


def lines_of(result: dict[str, Any], chip: Chip, devices: int) -> list[str]:
    """A report as text."""
    lines = []
    if "fits" in result:
        sizes = [(name, size) for name, size in result.items() if name.endswith("_gib")]
        parts = [f"{name[:-4].replace('_', ' ')} {size:.2f}" for name, size in sizes]
        verdict = "fits" if result["fits"] else "does not fit"
        seconds, cpu = result["seconds"], result["processor_seconds"]
        lines.append(f"{verdict} {chip.gib:.0f} GiB per device, {devices} device(s)")
        lines.append(f"GiB per device: {', '.join(parts)}")
        lines.append(f"compiled in {seconds:.0f} s, {cpu:.0f} s of processor time")
    if "why" in result:
        lines.append(f"the compiler: {result['why']}")
    if "kernels_per_forward" in result:
        lines.append(
            f"kernels per forward {result['kernels_per_forward']:.0f}, "
            f"per layer {result['kernels_per_layer']:.1f}"
        )
    if "inner_loops" in result:
        where = "a turn" if "kernels_per_forward" in result else "the program"
        lines.append(f"loops inside {where}: {result['inner_loops']}")
        lines.append(f"copies of half a megabyte or more: {result['large_copies']}")
        lines += [f"  {name}" for name in result["large_copies_made"][:8]]
    if "estimated_ms" in result:
        lines.append(time_line(result))
    for rows, point in result.get("rows", {}).items():
        lines.append(f"{rows:4d} rows: {time_line(point)}")
    if "by_cache" in result:
        lines += room.lines_of(result["by_cache"])
    for name in result:
        if name.startswith("largest_"):
            lines.append(f"largest {name.removeprefix('largest_')} that fits: {result[name]}")
    return lines


def time_line(result: dict[str, Any]) -> str:
    """The estimated time, with its label."""
    ms = f"{result['estimated_ms']:.3f} ms ({result['estimate']}); reading alone takes "
    ms += f"{result['floor_ms']:.3f}, arithmetic {result['arithmetic_ms']:.3f}"
    if "launch_ms" in result:
        ms += f", large arrays with it {result['memory_ms']:.3f}"
        ms += f", launches of {LAUNCH_US} us {result['launch_ms']:.3f}"
    return ms
