"""Types and checks of command-line values that several commands of eval share.

Decides what is refused before anything is loaded, measured or written. Knows no command.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from orthrus_jax.config import ModelConfig
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
    if not os.access(target.parent, os.W_OK):  # where a temporary file gets its name
        raise UserError(f"{flag} {path}: its directory cannot be written to")
    if picture:
        from matplotlib.backend_bases import FigureCanvasBase  # late: it takes a second

        suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
        if target.suffix[1:] not in suffixes:
            raise UserError(f"{flag} {path}: expected a name that ends in .{', .'.join(suffixes)}")


def check_directory(flag: str, path: pathlib.Path) -> None:
    """Refuse a directory that could not be made or written to, before the work it is to hold.

    Raises:
      UserError: for a file in its place or above it, or a place without permission to write.
    """
    above = path.absolute()
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise UserError(f"{flag} {path}: {above} is no directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: {above} cannot be written to")


def check_contexts(flag: str, contexts: Sequence[int], config: ModelConfig) -> None:
    """Refuse a context that leaves no position of the model for the next token.

    Raises:
      UserError: naming the longest context.
    """
    if (longest := max(contexts)) >= config.max_position_embeddings:
        raise UserError(
            f"{flag} {longest}: the model has {config.max_position_embeddings} positions, the "
            "next token's included"
        )
