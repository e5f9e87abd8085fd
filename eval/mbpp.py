"""Accuracy, acceptance and speed on MBPP: `python -m eval.mbpp --model DIR_OR_ID`."""

from eval.harness import command

if __name__ == "__main__":
    command("mbpp")
