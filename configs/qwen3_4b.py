"""Qwen3-4B.

Global batch 128 rows of 2,048 tokens. FIT
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
