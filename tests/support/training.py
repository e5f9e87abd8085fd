"""A small model and rows to train it on, and configs/tiny.py at a size that trains in seconds."""

import numpy as np

from configs.tiny import get_config
from orthrus_jax.config import ModelConfig
from orthrus_jax.model import Model, params
from tests.support.weights import random_params
from train.data import TokenizedDialogue, pack, stack

K, LENGTH, VOCAB = 4, 24, 47  # 47: no other size here, so shapes tell
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    block_size=K,
    mask_token_id=VOCAB - 1,
    dtype="float32",
)


def made_dialogues(seed=0, turns=1, count=40):
    rng = np.random.default_rng(seed)
    ids = lambda *bounds: rng.integers(0, VOCAB - 1, rng.integers(*bounds)).tolist()
    sizes = ((1, 5), (3, 9)) * turns  # of a prompt, of its answer
    return [TokenizedDialogue(*(ids(*bounds) for bounds in sizes)) for _ in range(count)]


def made_rows(seed=0, rows=3, length=LENGTH, turns=1):
    return stack(list(pack(made_dialogues(seed, turns), length, pad=0))[:rows])


def random_trees(seed=0, config=CONFIG):
    """Frozen and diffusion trees with weights large enough that the two views disagree."""
    return Model(config), *params.split(random_params(config, seed))


def miniature(run):
    """configs/tiny.py at a size that trains in seconds."""
    c = get_config()
    c.run, c.base = str(run), str(run / "base")
    c.model.update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16)
    c.model.update(num_attention_heads=2, num_key_value_heads=1, vocab_size=400)
    c.pretrain.update(steps=12, batch_size=4, row_length=256)
    c.distill.update(prompts=24, max_new_tokens=24, batch_size=8)
    c.train.update(block_size=6, steps=8, batch_size=2, anchors=6, log_every=2, eval_every=4)
    c.train.update(save_every=3)
    c.train.update(eval_prompts=4)
    c.head.update(steps=20, blocks=60, batch_size=16, rank=3)
    return c
