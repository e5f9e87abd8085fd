"""Qwen3-0.6B on one device: micro-batches of one row.

Global batch 128 rows of 2,048 tokens; fsdp over every device there is. What a slice needs, and whether
it is enough: `python -m orthrus_jax.aot --config configs/qwen3_0_6b.py --topology v5e:1x1 --program train`.
On one v5e chip the step needs 6.1 of 16 GiB, so on several use `--config.train.accumulate` to have at
least one row a device in each micro-batch.
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
