"""Compiled decoding loops on ids. Knows no text and no files."""

from orthrus_jax.decoding.constrained import reanchor
from orthrus_jax.decoding.overlapped import no_draft, one_forward_decode, two_forward_decode
from orthrus_jax.decoding.prefill import PREFILL_CHUNK, capacity, prefill
from orthrus_jax.decoding.sampling import Acceptance, AcceptRule, Drafts, Filters, Sampler
from orthrus_jax.decoding.speculative import accept, ar_decode, speculative_decode, verify
from orthrus_jax.decoding.state import (
    DecodeState,
    DecodingModel,
    Drafter,
    choose,
    extract,
    insert,
    shardings,
    stop,
)
from orthrus_jax.decoding.strategy import CYCLES, METHODS, Strategy

__all__ = [
    "CYCLES",
    "METHODS",
    "PREFILL_CHUNK",
    "AcceptRule",
    "Acceptance",
    "DecodeState",
    "DecodingModel",
    "Drafter",
    "Drafts",
    "Filters",
    "Sampler",
    "Strategy",
    "accept",
    "ar_decode",
    "capacity",
    "choose",
    "extract",
    "insert",
    "no_draft",
    "one_forward_decode",
    "prefill",
    "reanchor",
    "shardings",
    "speculative_decode",
    "stop",
    "two_forward_decode",
    "verify",
]
