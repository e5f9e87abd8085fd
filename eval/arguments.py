"""Types of command-line values that several commands of eval share. Knows no command."""

import argparse


def positive(text: str) -> int:
    """Parse a whole number of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_list(text: str) -> list[int]:
    """Parse a list of whole numbers of at least 1, like 1,4,16."""
    try:
        return [positive(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list like 1,4,16 of whole numbers of at least 1"
        ) from None
