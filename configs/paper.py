"""The paper's recipe (arXiv 2605.12825), which every configuration changes.

Knows no size and no base of its own.
"""

from ml_collections import ConfigDict


def recipe() -> ConfigDict:
    """Every value that `train.main` reads; the paper's where it gives one."""
    c = ConfigDict()
    c.run = ""  # the run's directory
    c.base = ""  # directory or hub id of the frozen Qwen3
    c.seed = 0
    c.responses = ""  # a directory or file of existing responses; "" generates them
    c.distributed = False  # several hosts: call jax.distributed.initialize() first

    c.distill = ConfigDict()  # see train.distill.DistillConfig
    c.distill.sources = (
        ("nvidia/Nemotron-Post-Training-Dataset-v2?split=math", 1.0),
        ("nvidia/Nemotron-Post-Training-Dataset-v2?split=code", 1.0),
        ("nvidia/Nemotron-Post-Training-Dataset-v2?split=chat", 1.0),
    )
    c.distill.prompts = 510_000  # 1:1:1, limited by `code`: 175,000 rows, of which some are skipped
    c.distill.max_new_tokens = 2048
    c.distill.max_prompt_tokens = 1024
    c.distill.thinking = False
    c.distill.mode = "ar"
    c.distill.temperature = 0.0
    c.distill.top_k = 0
    c.distill.top_p = 1.0
    c.distill.dtype = "bfloat16"
    c.distill.batch_size = 16  # answers decoded together, over all devices of a host
    c.distill.tensor = 1  # devices per copy of the base
    c.distill.shard_size = 4096

    c.mesh = ConfigDict()  # devices by axis; -1 takes the remaining ones
    c.mesh.data = 1
    c.mesh.fsdp = -1
    c.mesh.tensor = 1

    c.train = ConfigDict()
    c.train.seed = 0  # of the anchors
    c.train.dtype = "bfloat16"  # of compute and frozen weights; the trained ones are float32
    c.train.block_size = 32
    c.train.row_length = 2048
    c.train.document_masks = True  # False packs like the authors' code
    c.train.anchors = 256  # blocks per row
    c.train.batch_size = 128  # rows per step, over all devices
    c.train.accumulate = 1  # micro-batches per step
    c.train.steps = 7400  # two epochs of the paper's data
    c.train.learning_rate = 2e-4
    c.train.warmup = 0.05
    c.train.divergence = "kl"  # kl, tv or ce
    c.train.gamma = 0.0  # above 0: weigh position i by exp(-i / gamma)
    c.train.train_o_proj = True
    c.train.remat = "full"  # none, dots or full: what the backward pass recomputes
    c.train.stack_layers = True  # scan over layers: saves minutes of compilation
    c.train.log_every = 10
    c.train.eval_every = 500
    c.train.save_every = 250
    c.train.keep = 2  # recent checkpoints kept in addition to the best
    c.train.eval_prompts = 64
    # Prompts decoded every eval_every steps to choose the best checkpoint: no training data and no
    # test data.
    c.train.eval_sources = (("openai/gsm8k?config=main&split=train", 1.0),)

    c.head = ConfigDict()  # the pairwise head, trained after the view; not the paper's
    c.head.steps = 3000  # 0 trains none: the paper's drafting
    c.head.kind = "map"  # of the frozen embedding; or "table", of the vocabulary
    c.head.rank = 16
    c.head.blocks = 65_536  # recorded on the training answers
    c.head.batch_size = 512
    c.head.learning_rate = 1e-2
    c.head.gamma = 4.0  # weigh block position i by exp(-i / gamma)
    return c


def small_model() -> ConfigDict:
    """The recipe for a small base that train.pretrain makes: one device, float32, no remat.

    `model` and the rest of `pretrain` are the configuration's own.
    """
    c = recipe()
    c.model = ConfigDict()  # sizes of the base; train.main reads its config.json instead

    c.pretrain = ConfigDict()
    c.pretrain.warmup = 0.05
    c.pretrain.significant_bits = 0  # of each weight that are kept; 0 keeps all

    c.distill.dtype = "float32"
    c.distill.batch_size = 64

    c.train.dtype = "float32"
    c.train.log_every = 20
    c.train.save_every = 200
    c.train.eval_prompts = 32
    c.train.remat = "none"
    c.train.stack_layers = False

    c.head.kind = "table"  # of a small vocabulary
    c.head.blocks = 32_768  # twice as many give no more (docs/log.md)
    return c
