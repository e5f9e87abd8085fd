"""Who proposes drafts: one file per drafter, all behind decoding's `Drafter` protocol."""

from orthrus_jax.drafters.diffusion import DiffusionDrafter

__all__ = ["DiffusionDrafter"]
