"""Training: data, the objective, the loop, and the commands around them."""

from orthrus_jax.errors import require_extra

require_extra("train")
