"""Types and checks of command-line values that several commands of eval share.

Knows no command.
"""

import argparse
import pathlib

from orthrus_jax.errors import UserError


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


def check_output(flag: str, path: str | None, *, picture: bool = False) -> None:
    """Refuse a file that could not be written, before the work whose result it is to hold.

    Args:
      flag: that names the file, for the message.
      path: the file; None is none.
      picture: whether matplotlib writes it, in the format of its suffix.

    Raises:
      UserError: for a missing directory, a directory in place of a file, or an unknown suffix.
    """
    if path is None:
        return
    target = pathlib.Path(path).absolute()
    if not target.parent.is_dir():
        raise UserError(f"{flag} {path}: its directory does not exist")
    if target.is_dir():
        raise UserError(f"{flag} {path} is a directory: expected a file")
    if picture:
        from matplotlib.backend_bases import FigureCanvasBase  # late: it takes a second

        suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
        if target.suffix[1:] not in suffixes:
            raise UserError(f"{flag} {path}: expected a name that ends in .{', .'.join(suffixes)}")
