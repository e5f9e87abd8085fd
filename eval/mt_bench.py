"""Acceptance and speed on MT-Bench: `python -m eval.mt_bench --model DIR_OR_ID`."""

from eval.harness import command

if __name__ == "__main__":
    command("mt_bench")
