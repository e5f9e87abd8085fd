"""Qwen3-1.7B.

Global batch 128 rows of 2,048 tokens. FIT
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
