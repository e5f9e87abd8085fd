"""Where the checkout lies, and beside it the files that some tests read."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"
