"""Prompts to train SmolLM2's view on: `python -m train.smollm2_prompts --out runs/smollm2/prompts`.

GSM8K's and MBPP's training questions, never their test rows, and questions that the model writes
itself: after the chat template has opened a user's turn, its own continuation is a prompt (Magpie,
arXiv 2406.08464). Knows no answers: train.distill has the base write those.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

import orthrus_jax
from orthrus_jax.errors import UserError, run_command
from orthrus_jax.files import first_line, read_jsonl, write_atomic
from orthrus_jax.llm import LLM

HELD_OUT = 473  # of GSM8K's 7,473 training questions, the last, to evaluate during training
MBPP_SPLITS = {"mbpp": (601, 974), "mbpp_held_out": (511, 600)}  # task_id: train, validation
TOKENS = 160  # of a question of the model's own; a longer one is dropped
ROUND = 32  # questions written together
SHORTEST = 12  # characters
NAMES = {str: "a text", int: "a whole number", list: "a list"}

Prompts = list[dict[str, str]]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; writes one JSONL file per source, and one per held-out part.

    Raises:
      UserError: when a file cannot be read, or lacks rows of the training split.
    """
    parser = argparse.ArgumentParser("python -m train.smollm2_prompts", description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--model", default="runs/smollm2/base", metavar="DIR", help="default: %(default)s")
    add("--gsm8k", default="../shared/data/gsm8k_train.jsonl.gz", metavar="FILE")
    add("--mbpp", default="../shared/data/mbpp.jsonl", metavar="FILE", help="all 974 rows")
    add("--own", type=int, default=3000, metavar="N", help="questions of the model's own")
    add("--out", default="runs/smollm2/prompts", metavar="DIR", type=pathlib.Path)
    args = parser.parse_args(argv)
    questions = gsm8k(args.gsm8k)
    parts = {"gsm8k": questions[:-HELD_OUT], "gsm8k_held_out": questions[-HELD_OUT:]}
    parts |= {name: mbpp(args.mbpp, *split) for name, split in MBPP_SPLITS.items()}
    model = orthrus_jax.load(args.model) if args.own > 0 else None
    args.out.mkdir(parents=True, exist_ok=True)
    for name, prompts in parts.items():
        write(args.out / f"{name}.jsonl", prompts)
    own = [] if model is None else own_questions(model, args.own, args.out / "own.part.jsonl")
    write(args.out / "own.jsonl", [{"prompt": text} for text in own])
    (args.out / "own.part.jsonl").unlink(missing_ok=True)


def gsm8k(path: str) -> Prompts:
    """The questions of GSM8K's training rows."""
    prompts = [{"prompt": row["question"]} for row in _rows(path, {"question": str})]
    if len(prompts) <= HELD_OUT:
        raise UserError(f"--gsm8k {path} has {len(prompts)} rows, expected over {HELD_OUT}")
    return prompts


def mbpp(path: str, first: int, last: int) -> Prompts:
    """The tasks with numbers `first` to `last`, each with its first test."""
    kinds = {"task_id": int, "text": str, "test_list": list}
    rows = [row for row in _rows(path, kinds) if first <= row["task_id"] <= last]
    if not rows:
        raise UserError(f"--mbpp {path} has no task_id from {first} to {last}")
    if untested := [row["task_id"] for row in rows if not row["test_list"]]:
        raise UserError(f"--mbpp {path}: the task {untested[0]} has no test")
    return [{"prompt": f"{row['text']} For example:\n{row['test_list'][0]}"} for row in rows]


def own_questions(model: LLM, count: int, part: pathlib.Path) -> list[str]:
    """Have the model write `count` questions, each once.

    `part` holds those of the rounds that are over, so that a killed run goes on where it was.
    """
    rows = _rows(str(part), {"prompt": str, "round": int}) if part.exists() else []
    first = rows[-1]["round"] + 1 if rows else 0
    with tqdm(total=count, initial=len(rows), desc="own questions", unit="prompt") as bar:
        rounds = questions_of(model, first, [row["prompt"] for row in rows])
        while len(rows) < count:
            number, fresh = next(rounds)
            rows += [{"prompt": text, "round": number} for text in fresh]
            write_atomic(part, "".join(f"{json.dumps(row)}\n" for row in rows))
            bar.update(len(fresh))
    return [row["prompt"] for row in rows[:count]]


def questions_of(
    model: LLM, first: int = 0, known: Iterable[str] = ()
) -> Iterator[tuple[int, list[str]]]:
    """Yield rounds from the `first` on: its number, and the questions that the model wrote anew.

    Raises:
      UserError: when it writes none in 100 rounds.
    """
    prefix, written, fruitless = opened_turn(model), set(known), 0
    for seed in range(first, 2**32):
        answers = model.complete(
            [prefix], strategy="ar", temperature=1.0, top_p=0.95, seed=seed, n=ROUND,
            batch_size=ROUND, max_new_tokens=TOKENS,
        )  # fmt: skip
        # A question that was cut off, or one too short to ask anything, is none.
        ended = [a.text.strip() for a in answers if len(a.tokens) < TOKENS]
        long = (text for text in ended if len(text) >= SHORTEST and text not in written)
        fresh = list(dict.fromkeys(long))
        written |= set(fresh)
        fruitless = 0 if fresh else fruitless + 1
        if fruitless == 100:
            raise UserError("the model writes no questions: give --own 0")
        if fresh:
            yield seed, fresh


def opened_turn(model: LLM) -> list[int]:
    """Ids of a dialogue up to where the user's first message would begin."""
    mark = "\x00"
    template = model.tokenizer.apply_chat_template
    text = template([{"role": "user", "content": mark}], tokenize=False)
    return model.tokenizer(text.split(mark)[0], add_special_tokens=False)["input_ids"]


def write(path: pathlib.Path, prompts: Prompts) -> None:
    """Write one {"prompt": TEXT} per line."""
    write_atomic(path, "".join(f"{json.dumps(row)}\n" for row in prompts))
    print(f"{path}: {len(prompts):,} prompts")


def _rows(path: str, kinds: Mapping[str, type]) -> list[Any]:
    rows = []
    try:
        for number, row in read_jsonl(path):
            for key, kind in kinds.items():
                if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                    raise UserError(f'{path}:{number}: expected a "{key}", {NAMES[kind]}')
            rows.append(row)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None
    return rows


if __name__ == "__main__":
    run_command(main)
