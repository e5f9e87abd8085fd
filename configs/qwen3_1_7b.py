"""Qwen3-1.7B on up to four devices: micro-batches of four rows.

Global batch 128 rows of 2,048 tokens; fsdp over all devices. This compiles the step and
reports its memory:

    python -m train.aot --config configs/qwen3_1_7b.py --topology v5e:2x2

The step needs 5.4 GiB on each of four v5e chips, or 12.8 on one with train.accumulate=128.
"""

from ml_collections import ConfigDict

from configs.paper import recipe


def get_config() -> ConfigDict:
    """The paper's recipe on Qwen/Qwen3-1.7B."""
    c = recipe()
    c.base = "Qwen/Qwen3-1.7B"
    c.run = "runs/qwen3_1_7b"
    c.train.accumulate = 32
    return c
