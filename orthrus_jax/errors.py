"""The one exception a user is meant to read, and how a command shows it.

Anything a person can put right (a missing file, a bad flag, a prompt that does not fit) is raised
as `UserError` with what was found, what was expected and what to do. A bug is never a `UserError`.
"""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input, told in one line. Commands print it and exit with status 2."""


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`; a `UserError` or Ctrl-C ends it in one line, never in a traceback."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
