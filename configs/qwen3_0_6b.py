"""Qwen3-0.6B on one device: micro-batches of one row.

Global batch 128 rows of 2,048 tokens; fsdp over all devices. This compiles the step and
reports its memory:

    python -m train.aot --config configs/qwen3_0_6b.py --topology v5e:1x1

The step needs 6.1 GiB of a v5e chip. On several devices give each micro-batch at least one
row per device, with `--config.train.accumulate`.
"""

from ml_collections import ConfigDict

from configs.paper import recipe


def get_config() -> ConfigDict:
    """The paper's recipe on Qwen/Qwen3-0.6B."""
    c = recipe()
    c.base = "Qwen/Qwen3-0.6B"
    c.run = "runs/qwen3_0_6b"
    c.train.accumulate = 128
    return c
