"""The start of a confined process: `start.py program` or `start.py judge`.

Reads its settings as JSON from standard input. Run by path in an interpreter without site packages:
it makes the package importable, locks the process down, and only then hands over to the role.
"""

import faulthandler
import json
import os
import sys
import types


def main() -> None:
    """Read the settings, lock down, and run the role."""
    package = types.ModuleType("eval")
    package.__path__ = [os.path.dirname(os.path.dirname(os.path.abspath(__file__)))]
    sys.modules["eval"] = package  # less what the real one imports

    from eval.confined import hook, judge, limits, program

    settings = json.load(sys.stdin)
    layers = settings["layers"]
    if sys.platform != "linux":  # where the kernel does not end it with its parent
        faulthandler.dump_traceback_later(settings["seconds"] + 5, exit=True)
    held = limits.confine(settings, layers)  # of this thread, so it has to be the only one
    if sys.argv[1] == "judge":
        judge.main(settings, held)
    elif "audit" in layers:
        program.main(settings, [*held, "audit"], hook.watch)
    else:
        program.main(settings, held, None)


if __name__ == "__main__":
    main()
