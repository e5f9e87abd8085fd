"""Accuracy, acceptance and speed on GSM8K: `python -m eval.gsm8k --model DIR_OR_ID`."""

from eval.harness import command

if __name__ == "__main__":
    command("gsm8k")
