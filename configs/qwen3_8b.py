"""Qwen3-8B on up to eight devices: micro-batches of eight rows.

Global batch 128 rows of 2,048 tokens; fsdp over all devices. This compiles the step and
reports its memory:

    python -m train.aot --config configs/qwen3_8b.py --topology v6e:2x4

The step needs 13.1 GiB on each of eight v6e chips.
"""

from ml_collections import ConfigDict

from configs.paper import recipe


def get_config() -> ConfigDict:
    """The paper's recipe on Qwen/Qwen3-8B."""
    c = recipe()
    c.base = "Qwen/Qwen3-8B"
    c.run = "runs/qwen3_8b"
    c.train.accumulate = 16
    return c
