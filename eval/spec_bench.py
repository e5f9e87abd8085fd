"""Acceptance and speed on Spec-Bench: `python -m eval.spec_bench --model DIR_OR_ID`."""

from eval.harness import command

if __name__ == "__main__":
    command("spec_bench")
