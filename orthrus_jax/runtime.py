"""The user's compilation cache: where compiled programs stay between runs.

Compiling takes longer than many answers. JAX's own compilation cache therefore keeps programs in a
directory of the user, and the next run reads them from there. Knows no flags.
"""

import hashlib
import os
import pathlib
import platform

import jax

MIN_COMPILE_SECONDS = 0.3  # below that a file costs more than it saves


def enable_compilation_cache(where: str | None = None) -> None:
    """Keep compiled programs in the directory `where`, or nowhere if it is "off".

    None is JAX_COMPILATION_CACHE_DIR if that is set, else `user_directory`.
    """
    if where == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if where is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", where or str(user_directory()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


def user_directory() -> pathlib.Path:
    """The default directory of programs, one per kind of processor.

    Programs for the CPU use the instructions it has, and several machines may share a home.
    """
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n")
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind = platform.processor()
    name = f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    return pathlib.Path(root) / "orthrus_jax" / "programs" / name
