"""The user's compilation cache: where compiled programs stay between runs.

Compiling takes longer than many an answer. JAX's own compilation cache therefore keeps programs in
a directory of the user, and the next run finds them there.
"""

import hashlib
import os
import pathlib
import platform

import jax

LEAST_SECONDS = 0.3  # of compiling: below that a file costs more than it saves


def enable_compilation_cache(where: str | None = None) -> None:
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
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n")
        kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        kind = platform.processor()
    name = f"{platform.machine()}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}"
    return pathlib.Path(root) / "orthrus_jax" / "programs" / name
