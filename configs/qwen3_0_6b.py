"""Qwen3-0.6B on one TPU v6e chip, or any slice: 128 rows a step.

Global batch 128 rows of 2,048 tokens. FIT
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
