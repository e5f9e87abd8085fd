"""Qwen3-8B.

Global batch 128 rows of 2,048 tokens. FIT
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
