"""A fake model's segments, run in the order in which the real layers run them."""

import jax.numpy as jnp

from orthrus_jax.model import View


def in_lockstep(segments, rows, block, cache):
    """Run a mock model's segments as the real layers do: what AR rows write, blocks may read.

    `rows(segment, cache)` gives hidden states and the new cache of an AR segment, `block` the
    hidden states of a segment that is one block.
    """
    hidden = [None] * len(segments)
    for i, segment in enumerate(segments):
        if segment.view is View.AR:
            hidden[i], cache = rows(segment, cache)
    for i, segment in enumerate(segments):
        if segment.view is View.DIFFUSION:
            hidden[i] = jnp.concatenate([block(part, cache) for part in blocks(segment)], axis=1)
    return hidden, cache


def blocks(segment):
    """A segment of several blocks as one segment a block."""
    for i in range(segment.tokens.shape[1] // segment.block):
        at = slice(i * segment.block, (i + 1) * segment.block)
        sees = segment.branches
        if sees is not None:
            sees = sees.replace(seen=sees.seen[:, i : i + 1])
        tokens, positions = segment.tokens[:, at], segment.positions[:, at]
        yield segment.replace(tokens=tokens, positions=positions, branches=sees)


def views(segments) -> str:
    """The views of a forward's segments, as in "ar+diffusion"."""
    return "+".join(segment.view.value for segment in segments)
