"""Compiled decoding loops on ids. Knows no text and no files."""

from orthrus_jax.decoding.overlapped import Scheme, one_forward_decode, two_forward_decode
from orthrus_jax.decoding.prefill import PREFILL_CHUNK, capacity, prefill
from orthrus_jax.decoding.sampling import Drafts, Filters, Proposal, Rule, Sampler
from orthrus_jax.decoding.speculative import accept, ar_decode, draft, orthrus_decode, verify
from orthrus_jax.decoding.state import (
    DecodeState,
    DecodingModel,
    choose,
    emit,
    insert,
    shardings,
    stop,
)

__all__ = [
    "PREFILL_CHUNK",
    "DecodeState",
    "DecodingModel",
    "Drafts",
    "Filters",
    "Proposal",
    "Rule",
    "Sampler",
    "Scheme",
    "accept",
    "ar_decode",
    "capacity",
    "choose",
    "draft",
    "emit",
    "insert",
    "one_forward_decode",
    "orthrus_decode",
    "prefill",
    "shardings",
    "stop",
    "two_forward_decode",
    "verify",
]
