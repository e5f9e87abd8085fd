"""The machine that a command runs on: its devices, and the user's cache of compiled programs.

Compiling takes longer than many answers. JAX's own compilation cache therefore keeps programs in a
directory of the user, and the next run reads them from there. Knows no models.
"""

import glob
import hashlib
import importlib.util
import os
import pathlib
import platform
import sys
import tempfile
from typing import Any

import jax

from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line

MIN_COMPILE_SECONDS = 0.3  # below that a file costs more than it saves
GOOGLE = "0x1ae0"  # the PCI vendor of TPUs
GPU_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")


def check_devices() -> None:
    """Begin to use JAX's devices, before the work that needs them.

    Where libtpu is installed for `aot` alone, JAX would look for a TPU and print its errors: with
    neither a TPU nor a GPU plugin the platform is the CPU.

    Raises:
      UserError: when the platform that JAX_PLATFORMS names, or any, is not there, or compiling is
        turned off.
    """
    installed = lambda name: importlib.util.find_spec(name) is not None
    config: Any = jax.config  # its attributes are unknown to type checkers
    if config.jax_disable_jit:
        raise UserError("JAX_DISABLE_JIT is set: decoding runs compiled programs only; unset it")
    chosen = config.jax_platforms or any(map(installed, GPU_PLUGINS))
    if installed("libtpu") and not chosen and not has_tpu():
        config.update("jax_platforms", "cpu")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a plugin without its device
        wanted = os.environ.get("JAX_PLATFORMS")
        place = f"JAX_PLATFORMS={wanted}" if wanted else "JAX"
        raise UserError(
            f"{place} finds no device ({first_line(error)}): set JAX_PLATFORMS to a platform of "
            "this machine, such as cpu, or unset it"
        ) from None


def has_tpu() -> bool:
    """Whether this host has a TPU: a device file, a PCI card, or variables that tell of one."""
    cards = glob.glob("/sys/bus/pci/devices/*/vendor")
    return (
        bool(glob.glob("/dev/accel*"))
        or any(name.startswith(("TPU_", "COLAB_TPU")) for name in os.environ)
        or any(pathlib.Path(card).read_text().strip() == GOOGLE for card in cards)
    )


def enable_compilation_cache(where: str | None = None) -> None:
    """Keep compiled programs in the directory `where`, or nowhere if it is "off".

    None is JAX_COMPILATION_CACHE_DIR if that is set, else `user_directory`; if that cannot be
    written, programs are not kept.

    Raises:
      UserError: when `where` is no directory, or one that cannot be written.
    """
    if where is None and os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    if where != "off":
        try:
            directory = user_directory() if where is None else pathlib.Path(where)
            if "://" not in (where or ""):  # JAX writes to buckets too
                directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=directory).close()
            jax.config.update("jax_compilation_cache_dir", where or str(directory))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
            return
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: there is no home
            cause = first_line(error)
        if where is not None:
            raise UserError(
                f"--compile-cache {where!r} cannot be written ({cause}): give a directory, or off"
            )
        print(f"note: compiled programs are not kept ({cause})", file=sys.stderr)
    jax.config.update("jax_enable_compilation_cache", False)


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
