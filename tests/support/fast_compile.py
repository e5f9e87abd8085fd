"""How the suite's programs are compiled: fast. Imports no jax, so that it can come before it.

Most of the suite's time is compiling programs that then run for milliseconds. Much of it goes
without LLVM's optimisations, without a module of its own for each kernel, and with XLA's older way
to write a fused loop (jax 0.12 has it no more). What XLA itself does to a program is the same.
"""

import importlib.metadata

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


def on_devices(count: int) -> str:
    """XLA_FLAGS of a process that sees so many (fake) devices."""
    return f"--xla_force_host_platform_device_count={count} {FLAGS}"
