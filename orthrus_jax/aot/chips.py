"""The chips that programs are compiled for: memory, speeds, and how XLA is told of each.

Speeds are the makers' data sheets. Knows no programs and no models.
"""

from typing import NamedTuple


class Chip(NamedTuple):
    """One kind of chip.

    Attributes:
      gib: memory, GiB.
      bandwidth: of its memory, bytes/s.
      flops: dense bfloat16, FLOP/s.
      ghz: clock of a TPU's cores; None for a GPU.
      target: a GPU's description for XLA, a GpuTargetConfigProto in text form; None for a TPU.
    """

    gib: float
    bandwidth: float
    flops: float
    ghz: float | None = None
    target: str | None = None


LAUNCH_US = 2.5
"""Microseconds from one kernel to the next on a GPU's stream: assumed, of the usual 2 to 3.

In a CUDA graph it is about 1.
"""


def _gpu(
    name: str,
    sm: tuple[int, int],
    *,
    bandwidth: float,
    flops: float,
    memory: int,
    cores: int,
    ghz: float,
    l2: int,
    shared_per_core: int,
    threads_per_core: int = 2048,
) -> Chip:
    """A GPU, with the numbers that XLA reads while it compiles."""
    target = f"""gpu_device_info {{
      threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
      shared_memory_per_core: {shared_per_core} threads_per_core_limit: {threads_per_core}
      core_count: {cores} fpus_per_core: {64 if sm == (8, 0) else 128}
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {bandwidth:.0f} l2_cache_size: {l2} clock_rate_ghz: {ghz}
      device_memory_size: {memory} shared_memory_per_block_optin: {shared_per_core - 1024}
      cuda_compute_capability {{ major: {sm[0]} minor: {sm[1]} }}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
      platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
      device_description_str: "{name}" """
    return Chip(memory / 2**30, bandwidth, flops, target=target)


# A TPU's clock follows from its peak: 2 x 128 x 128 (v6e: 256 x 256) x matrix units x clock. With
# it, the cycles that libtpu 0.0.52 estimates for adding 1 to 1 GiB are 0.81 of the bandwidth here,
# on v5e and v6e alike.
CHIPS = {
    "v4": Chip(32, 1228e9, 275e12, 1.05),
    "v5e": Chip(16, 819e9, 197e12, 1.5),
    "v5p": Chip(95, 2765e9, 459e12, 1.75),
    "v6e": Chip(32, 1640e9, 918e12, 1.75),
    "h100": _gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), bandwidth=3352e9, flops=989e12, memory=84_978_434_048,
        cores=132, ghz=1.98, l2=52_428_800, shared_per_core=233_472,
    ),
    "h200": _gpu(
        "NVIDIA H200", (9, 0), bandwidth=4800e9, flops=989e12, memory=150_121_545_728,
        cores=132, ghz=1.98, l2=62_914_560, shared_per_core=233_472,
    ),
    "a100-80g": _gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), bandwidth=2039e9, flops=312e12, memory=84_987_740_160,
        cores=108, ghz=1.41, l2=41_943_040, shared_per_core=167_936,
    ),
    "l4": _gpu(
        "NVIDIA L4", (8, 9), bandwidth=300e9, flops=121e12, memory=23_660_331_008,
        cores=58, ghz=2.04, l2=50_331_648, shared_per_core=102_400, threads_per_core=1536,
    ),
}  # fmt: skip
