"""What a command is told of the machine: which dtype, which devices, where compiled programs stay.

Compiling takes longer than many an answer. Programs are therefore kept in a directory of the user,
by jax's own compilation cache, and the next run of a command finds them there.
"""

import argparse
import hashlib
import os
import pathlib
import platform
from typing import Any

import jax

from orthrus_jax import sharding
from orthrus_jax.config import DTYPES
from orthrus_jax.errors import UserError

LEAST_SECONDS = 0.3  # of compiling: below that a file costs more than it saves


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --dtype, --mesh and --compile-cache."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's")
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="decode on several devices: data=N,tensor=M shares out rows over N and heads over M; "
        "one of them may be -1, what is left; default: one device",
    )
    add_cache(parser)


def add_cache(parser: argparse.ArgumentParser) -> None:
    """Add --compile-cache."""
    parser.add_argument(
        "--compile-cache",
        metavar="DIR",
        help="where compiled programs are kept, or off; "
        "default: JAX_COMPILATION_CACHE_DIR, or a directory of yours",
    )


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Turn the cache on as told; return dtype and mesh as `generate.load` takes them."""
    keep_programs(args.compile_cache)
    return {"dtype": args.dtype, "mesh": mesh_of(args.mesh)}


def keep_programs(where: str | None = None) -> None:
    """Keep compiled programs in a directory, see --compile-cache."""
    if where == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if where is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", where or str(user_directory()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)


def user_directory() -> pathlib.Path:
    """Where programs are kept by default: apart for each kind of processor.

    Programs for the CPU use what instructions it has, and a home may be shared by several.
    """
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind = platform.processor()
    name = f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    return pathlib.Path(root) / "orthrus_jax" / "programs" / name


def mesh_of(text: str | None) -> jax.sharding.Mesh | None:
    """The mesh that --mesh asks for; None for none.

    Raises:
      UserError: for an unknown axis, a size that is no number, or one that does not fit.
    """
    if text is None:
        return None
    sizes = {sharding.DATA: 1, sharding.TENSOR: 1}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sizes or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh {text!r}: expected something like data=2,tensor=4")
        sizes[axis] = int(size)
    return sharding.make_mesh(data=sizes[sharding.DATA], tensor=sizes[sharding.TENSOR])
