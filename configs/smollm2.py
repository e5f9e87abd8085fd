"""The diffusion view of SmolLM2-135M-Instruct, for two CPU cores or one GPU.

Its prompts are GSM8K's and MBPP's training questions and questions that the model writes itself;
its answers are its own, greedy. No test row is trained on.

    make smollm2
    python -m train.smollm2_prompts --out runs/smollm2/prompts
    python -m train.main --config configs/smollm2.py
    python -m orthrus_jax.convert --from runs/smollm2/model --to smollm2-view.safetensors \
        --rank 64 --dtype bfloat16
"""

from ml_collections import ConfigDict

from configs.paper import recipe

PROMPTS = "runs/smollm2/prompts"


def get_config() -> ConfigDict:
    """The configuration of `train.main`, `train.distill` and `train.bench`."""
    c = recipe()
    c.run = "runs/smollm2"
    c.base = "runs/smollm2/base"

    c.distill.sources = (  # weights: prompts, of 7,000, 374 and 3,000
        (f"{PROMPTS}/gsm8k.jsonl", 3000.0),
        (f"{PROMPTS}/mbpp.jsonl", 360.0),
        (f"{PROMPTS}/own.jsonl", 2640.0),
    )
    c.distill.prompts = 6000
    c.distill.max_new_tokens = 256
    c.distill.max_prompt_tokens = 256
    c.distill.dtype = "float32"
    c.distill.batch_size = 32
    c.distill.shard_size = 512  # the most that a killed run loses

    c.train.dtype = "float32"
    c.train.block_size = 8
    c.train.gamma = 4.0
    c.train.row_length = 320
    c.train.anchors = 32
    c.train.batch_size = 3  # 8.5 s a step on two cores
    c.train.steps = 3400  # eight hours there
    c.train.learning_rate = 5e-4
    c.train.remat = "none"
    c.train.stack_layers = False
    c.train.log_every = 10
    c.train.eval_every = 170
    c.train.save_every = 50
    c.train.eval_prompts = 24
    c.train.eval_sources = (
        (f"{PROMPTS}/gsm8k_held_out.jsonl", 2.0),
        (f"{PROMPTS}/mbpp_held_out.jsonl", 1.0),
    )
    return c
