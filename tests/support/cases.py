"""The cases over which exactness is shown: shape x cache x strategy.

A new family, cache kind, attention implementation, drafter or method gets the whole proof for a row
in one of these tables. FAST holds pairs in which every row of every table occurs; EVERY is the
product, for the slow suite.
"""

import dataclasses
import itertools
from typing import NamedTuple

import pytest

from orthrus_jax.attention.attend import IMPLEMENTATIONS
from orthrus_jax.decoding import Strategy
from tests.support.configs import FAMILIES

ATTENTION = list(IMPLEMENTATIONS)
SHAPES = {  # changes of tiny_config
    "tied, grouped heads": {},
    "untied": {"tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1},
    "no grouping, odd block": {"num_key_value_heads": 4, "block_size": 5},
    **{name: FAMILIES[name] for name in ("qwen2", "llama", "llama3")},  # a Mistral computes a Llama
}
STRATEGIES = {
    "paper": Strategy("orthrus"),
    "paper, short block": Strategy("orthrus", 2),
    "two-forward": Strategy("orthrus-2f"),
    "two-forward, tree": Strategy("orthrus-2f", tree_nodes=7),
    "length blocks": Strategy("orthrus-1f", early_blocks=2),
    "outcome blocks": Strategy("orthrus-1f", early_blocks=0, fresh_blocks=3),
    "both blocks": Strategy("orthrus-1f", early_blocks=2, fresh_blocks=2),
    "tree, length blocks": Strategy("orthrus-1f", tree_nodes=6, early_blocks=3),
    "tree, both blocks": Strategy("orthrus-1f", tree_nodes=9, early_blocks=2, fresh_blocks=2),
}
STRATEGIES = {name: dataclasses.replace(s, pairwise=False) for name, s in STRATEGIES.items()} | {
    f"{name}, pairwise": dataclasses.replace(STRATEGIES[name], pairwise=True)
    for name in (
        *("paper", "two-forward", "two-forward, tree", "length blocks", "outcome blocks"),
        *("tree, length blocks", "tree, both blocks"),
    )
}
CACHES = {  # slots, and changes of Model: which way of storing and reading a cache is taken
    "few slots": (64, {}),
    "read in chunks": (1536, {}),
    **{f"attention {name}": (64, {"attention": name}) for name in ATTENTION},
}


class Case(NamedTuple):
    """One row of each table, by name."""

    shape: str
    cache: str
    strategy: str


EVERY = [Case(*names) for names in itertools.product(SHAPES, CACHES, STRATEGIES)]
# Diagonals through the product: as many cases as the longest table has rows.
FAST = [
    Case(shape, cache, strategy)
    for shape, cache, strategy in zip(
        itertools.cycle(SHAPES), itertools.cycle(CACHES), STRATEGIES, strict=False
    )
]
CASES = [
    *FAST,
    *(pytest.param(case, marks=pytest.mark.slow) for case in EVERY if case not in FAST),
]
