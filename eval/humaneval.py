"""Accuracy, acceptance and speed on HumanEval: `python -m eval.humaneval --model DIR_OR_ID`."""

from eval.harness import command

if __name__ == "__main__":
    command("humaneval")
