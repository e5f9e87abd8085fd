"""One draft-verify cycle under masks: which tokens may follow is the host's to say.

A grammar's mask for a token follows from the tokens before it, so the host must know the drafts
before they are verified: a cycle is two programs, `propose` and `masked_cycle`. A draft that its
mask forbids has no probability, and is rejected like any other. The text is that of AR decoding
under the same masks.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from orthrus_jax.decoding.sampling import AcceptRule, Drafts
from orthrus_jax.decoding.speculative import accept, verify, verify_drafts
from orthrus_jax.decoding.state import DecodeState, DecodingModel, Drafter, settled

Array = jax.Array
MASKED_METHODS = ("ar", "orthrus")  # of Strategy, whose cycles `masked_cycle` can be
WORD = 32  # tokens per word of a mask


def mask_words(vocab_size: int) -> int:
    """Words uint32 of a mask over the vocabulary: bit j of word i is token 32 i + j."""
    return -(-vocab_size // WORD)


def unpack(allowed: Array, vocab_size: int) -> Array:
    """Masks bool[..., V] of words uint32[..., W]."""
    bits = allowed[..., None] >> jnp.arange(WORD, dtype=jnp.uint32) & 1
    return bits.reshape(*allowed.shape[:-1], -1)[..., :vocab_size].astype(bool)


@partial(jax.jit, donate_argnames=("state",))
def reanchor(state: DecodeState, anchor: Array) -> DecodeState:
    """Forget the token that a prefill of all but the prompt's last token emitted.

    The first cycle then begins at `anchor` int32[B], that last token, and emits the answer's first
    token under its mask. `state` is donated.
    """
    zeros = jnp.zeros_like(state.count)
    return state.replace(count=zeros, anchor=anchor, done=state.budget <= 0)


@partial(jax.jit, static_argnames=("model", "drafter"))
def propose(model: DecodingModel, params: Any, state: DecodeState, *, drafter: Drafter) -> Array:
    """The tokens int32[B, K-1] that a drafter without a carry guesses after the anchor."""
    del model  # the drafter has it
    return drafter.propose(params, state)[0].tokens


@partial(jax.jit, static_argnames=("model", "rule"), donate_argnames=("state",))
def masked_cycle(
    model: DecodingModel,
    params: Any,
    state: DecodeState,
    drafts: Array,
    allowed: Array,
    *,
    rule: AcceptRule,
) -> DecodeState:
    """Verify the drafts under masks, and emit what is accepted.

    Args:
      model: static.
      params: of the base.
      state: donated.
      drafts: int32[B, K-1]; K = 1 is a step of AR decoding.
      allowed: uint32[B, K, W], for the token after the anchor and after each draft; rows after a
        forbidden draft are not looked at. Each mask allows at least one token.
      rule: static; matters only with a sampler.
    """
    state = settled(state, drafts.shape[1] + 1)
    logits, cache, _ = verify(model, params, state, Drafts(drafts))
    state = state.replace(cache=cache)
    masked = jnp.where(unpack(allowed, logits.shape[-1]), logits, -jnp.inf)
    verdict = verify_drafts(state, Drafts(drafts), masked, rule)
    return accept(state, verdict, logits)[0]
