"""Descriptions of chips that are not attached, as XLA's compilers take them.

Each compiler is a library: libtpu for TPUs, JAX's CUDA plugin for GPUs, which needs neither a GPU
nor a driver. Knows no programs.
"""

import importlib.util
import os
from typing import Any

from orthrus_jax.aot.chips import CHIPS, Chip
from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # it looks for a driver
}


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as "v5e:2x2" or "h100:1".

    Raises:
      UserError: for a chip that is not in CHIPS, or no shape.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not shape:
        raise UserError(
            f"--topology {topology} is not KIND:SHAPE with a KIND of {', '.join(CHIPS)}"
        )
    return CHIPS[kind]


def devices_of(topology: str) -> list[Any]:
    """Descriptions of the chips of a slice such as "v5e:2x2", or of N GPUs such as "h100:1".

    Raises:
      UserError: without the compiler's library, or for a topology that it does not know.
    """
    chip = chip_of(topology)
    shape = topology.partition(":")[2]
    installed = lambda name: importlib.util.find_spec(name) is not None
    if chip.target is None:
        if not installed("libtpu"):
            raise UserError("ahead-of-time compilation for TPU needs libtpu: pip install libtpu")
        one = {"chips_per_host_bounds": [1, 1, 1]} if shape == "1x1" else {}
        options: dict[str, Any] = {"platform": "tpu", "topology_name": topology, **one}
    else:
        if not any(map(installed, PLUGINS)):
            raise UserError(
                "ahead-of-time compilation for a GPU needs JAX's CUDA plugin (no GPU, no driver): "
                "pip install 'orthrus-jax[aot-gpu]'"
            )
        if not shape.isdecimal() or int(shape) < 1:
            raise UserError(f"--topology {topology}: expected a number of GPUs, e.g. h100:1")
        options = {"platform": "cuda", "topology_name": "", "topology": f"1x1x{shape}"}
        options["target_config"] = chip.target
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:  # both libraries raise their own types for an unknown topology
        why = first_line(error)
        raise UserError(f"--topology {topology} is refused by the compiler: {why:.200}") from None
