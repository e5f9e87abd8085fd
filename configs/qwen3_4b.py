"""Qwen3-4B on up to eight devices: micro-batches of eight rows.

Global batch 128 rows of 2,048 tokens; fsdp over all devices. This compiles the step and
reports its memory:

    python -m train.aot --config configs/qwen3_4b.py --topology v5e:2x4

The step needs 6.8 GiB on each of eight v5e chips.
"""

from ml_collections import ConfigDict

from configs.paper import recipe


def get_config() -> ConfigDict:
    """The paper's recipe on Qwen/Qwen3-4B."""
    c = recipe()
    c.base = "Qwen/Qwen3-4B"
    c.run = "runs/qwen3_4b"
    c.train.accumulate = 16
    return c
