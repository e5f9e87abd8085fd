"""A 40 M-parameter base on GSM8K's training questions and its diffusion view, for one accelerator.

Larger than tiny.py, on human-written text. Hold out some of the data set's train.jsonl (7,473 rows
of "question" and "answer") to evaluate during training; train the base, then the view on the base's
answers; measure on the test rows:

    mkdir -p data && head -n 7000 train.jsonl > data/train.jsonl
    tail -n +7001 train.jsonl > data/held_out.jsonl
    python -m train.pretrain --config configs/small.py
    python -m train.main --config configs/small.py
    python -m eval.gsm8k --model runs/small/model --max-new-tokens 256
"""

from ml_collections import ConfigDict

from configs.paper import small_model


def get_config() -> ConfigDict:
    """The configuration of `train.pretrain`, `train.main` and `train.bench`."""
    c = small_model()
    c.run = "runs/small"
    c.base = "runs/small/base"

    c.model.vocab_size = 4096
    c.model.hidden_size = 640
    c.model.intermediate_size = 1920
    c.model.num_hidden_layers = 8
    c.model.num_attention_heads = 10
    c.model.num_key_value_heads = 5
    c.model.head_dim = 64

    c.pretrain.data = "data/train.jsonl"
    c.pretrain.steps = 1200  # of 4,096 tokens: about three epochs
    c.pretrain.batch_size = 8
    c.pretrain.row_length = 512
    c.pretrain.learning_rate = 1e-3
    c.pretrain.question_weight = 0.3

    c.distill.sources = (("data/train.jsonl", 1.0),)
    c.distill.prompts = 7000
    c.distill.max_new_tokens = 256

    c.train.block_size = 16
    c.train.row_length = 512
    c.train.anchors = 32
    c.train.batch_size = 8
    c.train.steps = 2000
    c.train.learning_rate = 1e-3
    c.train.eval_every = 400
    c.train.eval_sources = (("data/held_out.jsonl", 1.0),)
    return c
