"""Parameter trees: the frozen base, the diffusion subtree, and the ways to make both.

`split` and `merge` alone decide which parameters are trained. Knows no files: checkpoint/tensors.py
has names and shapes there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from orthrus_jax.config import ModelConfig
from orthrus_jax.model import STACKED, Model, Params
from orthrus_jax.model.pairwise import HEAD

DIFFUSION = "self_attn_diff"


def split(params: Params, *, freeze: Sequence[str] = ()) -> tuple[Params, Params]:
    """Part a whole tree into (frozen, diffusion); together they hold every leaf once.

    Diffusion modules named in `freeze`, such as "o_proj", go to the frozen part. A pairwise head is
    of the diffusion part: it is no weight of the base.
    """
    flat = traverse_util.flatten_dict(params)
    parts: tuple[dict, dict] = ({}, {})
    for path, leaf in flat.items():
        trained = DIFFUSION in path or HEAD in path
        parts[trained and not set(freeze) & set(path)][path] = leaf
    frozen, diffusion = (traverse_util.unflatten_dict(part) for part in parts)
    return frozen, diffusion


def merge(frozen: Params, diffusion: Params) -> Params:
    """Join the two subtrees to the tree that `Model.forward` takes. Copies no array."""
    flat = traverse_util.flatten_dict(frozen) | traverse_util.flatten_dict(diffusion)
    return traverse_util.unflatten_dict(flat)


def diffusion_from_base(params: Params) -> Params:
    """Return the diffusion subtree every training starts from: a copy of the AR attention."""
    frozen = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict(
        {
            tuple(DIFFUSION if name == "self_attn" else name for name in path): jnp.array(leaf)
            for path, leaf in frozen.items()
            if "self_attn" in path
        }
    )


def stack(
    params: Params,
    join: Callable[[Any, Sequence[Any]], Any] = lambda path, leaves: jnp.stack(leaves),
) -> Params:
    """Join the layers' weights along a new first axis, over which training scans.

    {"layers_0": {"x": [..]}, "layers_1": ...} -> {"layers": {"x": [2, ..]}}. Works on either
    subtree; arrays may be ShapeDtypeStructs of `jax.eval_shape`. `join(path, leaves)` makes the
    array of one weight from its path in a layer and its leaves in all layers.
    """
    layers = sorted((k for k in params if k.startswith("layers_")), key=lambda k: int(k[7:]))
    rest = {k: v for k, v in params.items() if k not in layers}
    joined = jax.tree_util.tree_map_with_path(
        lambda path, *leaves: join(path, leaves), *(params[k] for k in layers)
    )
    return rest | {STACKED: joined}


def unstack(params: Params) -> Params:
    """Undo `stack`."""
    rest = {k: v for k, v in params.items() if k != STACKED}
    count = jax.tree.leaves(params[STACKED])[0].shape[0]
    return rest | {
        f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params[STACKED])
        for i in range(count)
    }


def init(model: Model, key: jax.Array) -> Params:
    """Fresh float32 parameters of a base and, in its diffusion view, a copy of its attention."""
    frozen, _ = split(jax.jit(model.init)(key))  # op by op it takes many times as long
    return merge(frozen, diffusion_from_base(frozen))


def shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Return the shape of every parameter by path, without allocating any."""
    tree = jax.eval_shape(Model(config).init, jax.random.key(0))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def count(params: Params) -> int:
    """Return the number of parameters in a tree."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
