"""Train the same view with several objectives and seeds: `python -m train.compare --out DIR`.

Every run is `train.main` with the configuration's base and one set of responses, an objective and a
seed of its own, in a process of its own. A run that is there already is not made again. Prints a
table, draws acceptance length against steps to DIR/compare.png.
"""

import argparse
import collections
import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Sequence

from tqdm import tqdm

from orthrus_jax.errors import UserError, run_command

# What is changed of the configuration's `train`: all of the objective, whatever it has there.
VARIANTS: dict[str, dict[str, str | float]] = {
    "KL": {"divergence": "kl", "gamma": 0.0},
    "CE": {"divergence": "ce", "gamma": 0.0},
    "TV": {"divergence": "tv", "gamma": 0.0},
    "KL, gamma 4": {"divergence": "kl", "gamma": 4.0},
    "KL, gamma 2": {"divergence": "kl", "gamma": 2.0},
}
Curve = dict[int, float]  # acceptance length by step


def commands(args: argparse.Namespace) -> dict[tuple[str, int], list[str]]:
    """The command of every run, by variant and seed."""
    found = {}
    for name, changes in VARIANTS.items():
        for seed in range(args.seeds):
            values: dict[str, object] = {f"train.{key}": v for key, v in changes.items()}
            values |= {"seed": seed, "train.seed": seed, "responses": args.responses}
            values |= {"run": directory(args, name, seed)}
            found[name, seed] = [
                *(sys.executable, "-m", "train.main", "--config", args.config),
                *(f"--config.{key}={value}" for key, value in values.items()),
                *(f"--config.{setting}" for setting in args.set),
            ]
    return found


def directory(args: argparse.Namespace, name: str, seed: int) -> pathlib.Path:
    """Where a run lies."""
    word = name.lower().replace(", ", "-").replace(" ", "")
    return pathlib.Path(args.out) / f"{word}-{seed}"


def run_all(args: argparse.Namespace) -> None:
    """Make the runs that are not there.

    Raises:
      UserError: when one fails, with the end of what it said.
    """
    left = {
        key: command
        for key, command in commands(args).items()
        if not (directory(args, *key) / "train.json").exists()
    }
    run = lambda command: subprocess.run(command, capture_output=True, text=True)
    with (
        concurrent.futures.ThreadPoolExecutor(args.jobs) as pool,
        tqdm(total=len(left), desc="runs", file=sys.stderr) as bar,
    ):
        waiting = {pool.submit(run, command): key for key, command in left.items()}
        for done in concurrent.futures.as_completed(waiting):
            if done.result().returncode:
                pool.shutdown(wait=False, cancel_futures=True)
                lines = done.result().stderr.strip().splitlines() or ["it said nothing"]
                raise UserError(f"the run {waiting[done]} failed: {lines[-1]}")
            bar.update()


def curves(args: argparse.Namespace) -> dict[str, list[Curve]]:
    """Acceptance length by step of every run, by variant."""
    found: dict[str, list[Curve]] = collections.defaultdict(list)
    for name, seed in commands(args):
        lines = (directory(args, name, seed) / "train.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        found[name].append(
            {r["step"]: r["acceptance_length"] for r in records if "acceptance_length" in r}
        )
    return found


def table(found: dict[str, list[Curve]]) -> str:
    """The last acceptance length of every variant."""
    lines = ["| objective | acceptance length at the end, mean | by seed |", "|---|---|---|"]
    for name, runs in found.items():
        last = [curve[max(curve)] for curve in runs]
        each = ", ".join(f"{value:.2f}" for value in last)
        lines.append(f"| {name} | {statistics.mean(last):.2f} | {each} |")
    return "\n".join(lines)


def draw(found: dict[str, list[Curve]], path: pathlib.Path) -> None:
    """Plot the mean over seeds against steps, and each seed thinly."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for i, (name, runs) in enumerate(found.items()):
        steps = sorted(set.intersection(*(set(curve) for curve in runs)))
        for curve in runs:
            axes.plot(steps, [curve[s] for s in steps], color=f"C{i}", alpha=0.25, linewidth=1)
        mean = [statistics.mean(curve[s] for curve in runs) for s in steps]
        axes.plot(steps, mean, "o-", color=f"C{i}", label=name)
    axes.set(xlabel="steps", ylabel="acceptance length (drafts a cycle)")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m train.compare", description=__doc__)
    add = parser.add_argument
    add("--config", default="configs/tiny.py", metavar="FILE", help="default: %(default)s")
    add("--responses", required=True, metavar="DIR", help="what all train on, see train.distill")
    add("--out", required=True, metavar="DIR", help="where the runs go, and compare.png")
    add("--seeds", type=int, default=3, metavar="N", help="runs an objective; default: %(default)s")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time; default: %(default)s")
    add("--set", action="append", default=[], metavar="NAME=VALUE",
        help="change the configuration of all, e.g. --set train.steps=400")  # fmt: skip
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.jobs < 1:
        raise UserError("--seeds and --jobs must be at least 1")
    for path in args.config, args.responses:
        if not pathlib.Path(path).exists():
            raise UserError(f"{path} is not there")
    run_all(args)
    found = curves(args)
    draw(found, pathlib.Path(args.out) / "compare.png")
    print(table(found))


if __name__ == "__main__":
    run_command(main)
