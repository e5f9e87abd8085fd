"""Who proposes drafts: one file per drafter, all behind decoding's `Drafter` protocol."""

from orthrus_jax.drafters.diffusion import DiffusionDrafter
from orthrus_jax.drafters.methods import drafter_of, first_carry, loop_of

__all__ = ["DiffusionDrafter", "drafter_of", "first_carry", "loop_of"]
