"""Accuracy, acceptance and speed on MATH-500: `python -m eval.math500 --model DIR_OR_ID`."""

from eval.harness import command

if __name__ == "__main__":
    command("math500")
