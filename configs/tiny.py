"""The demo: a 6.1 M-parameter base on made problems and its diffusion view, for two CPU cores."""

from ml_collections import ConfigDict

from configs.paper import small_model


def get_config() -> ConfigDict:
    """The configuration of `train.pretrain`, `train.main` and `eval.demo`."""
    c = small_model()
    c.run = "runs/demo"  # for base/, model/, report.json and the plots
    c.base = "runs/demo/base"  # a Qwen3 directory: the frozen base

    c.model.vocab_size = 1024
    c.model.hidden_size = 384  # wide and shallow: fewer small operations per forward
    c.model.intermediate_size = 1280
    c.model.num_hidden_layers = 3
    c.model.num_attention_heads = 8
    c.model.num_key_value_heads = 4
    c.model.head_dim = 48

    c.pretrain.data = ""  # the made problems
    c.pretrain.steps = 1600
    c.pretrain.batch_size = 9
    c.pretrain.row_length = 448
    c.pretrain.learning_rate = 2.5e-3
    c.pretrain.question_weight = 0.1  # weight of the loss on question tokens; answer tokens have 1
    c.pretrain.significant_bits = 5  # per weight: keeps the packed base under 8 MB

    c.distill.sources = (("problems", 1.0),)
    c.distill.prompts = 1200
    c.distill.max_new_tokens = 224

    c.train.block_size = 8  # on two cores longer blocks cost more time than they save
    c.train.row_length = 256
    c.train.anchors = 24
    c.train.gamma = 4.0  # best of the objectives compared on this task (docs/results.md)
    c.train.batch_size = 4
    c.train.steps = 700
    c.train.learning_rate = 4e-3
    c.train.eval_every = 200
    c.train.eval_sources = (("problems?split=held-out", 1.0),)
    return c
