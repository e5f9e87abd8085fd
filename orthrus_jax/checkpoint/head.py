"""The pairwise head's tensors, in a file beside the weights or within a view's.

Loaders that do not know the file read a directory as before: config.json and the weight files are
the same with and without. Its leaves are float32 whatever the weights are. Knows no scores.
"""

import pathlib

import numpy as np
from flax import traverse_util
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load, save

from orthrus_jax.checkpoint.directory import checked_path
from orthrus_jax.checkpoint.tensors import TensorSpec, to_device
from orthrus_jax.config import ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line, write_atomic
from orthrus_jax.model.pairwise import HEAD, KINDS, Head, shapes

HEAD_FILE = f"{HEAD}.safetensors"
PREFIX = f"{HEAD}."  # of its tensors' names


def save_head(directory: pathlib.Path, head: Head) -> None:
    """Write a head into a checkpoint's directory, in place of one that is there."""
    write_atomic(directory / HEAD_FILE, save(head_tensors(head)))


def load_head(
    directory: pathlib.Path, config: ModelConfig, mesh: Mesh | None = None
) -> Head | None:
    """Read the head of a checkpoint; None if it has none. On a mesh each device holds all of it.

    Raises:
      UserError: for a damaged file, or tensors that do not fit the config.
    """
    if not (directory / HEAD_FILE).exists():
        return None
    path = checked_path(directory, HEAD_FILE)
    try:
        tensors = load(path.read_bytes())
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({first_line(error)}): delete it to draft "
            "without a pairwise head"
        ) from None
    return head_of(path, tensors, config, mesh)


def head_tensors(head: Head) -> dict[str, np.ndarray]:
    """A head's leaves by their names in a file."""
    flat = traverse_util.flatten_dict(head, sep=".")
    return {f"{PREFIX}{name}": np.asarray(leaf, np.float32) for name, leaf in flat.items()}


def head_of(
    path: pathlib.Path, tensors: dict[str, np.ndarray], config: ModelConfig, mesh: Mesh | None
) -> Head:
    """The head of the tensors of a file, placed.

    Raises:
      UserError: naming the file, for tensors that are no head of this config.
    """
    flat = {tuple(name.removeprefix(PREFIX).split(".")): leaf for name, leaf in tensors.items()}
    if not _fits(flat, config):
        sizes = ", ".join(f"{name} {list(leaf.shape)}" for name, leaf in sorted(tensors.items()))
        raise UserError(
            f"{path} does not fit config.json: it holds {sizes or 'nothing'}, for vocab_size="
            f"{config.vocab_size} and hidden_size={config.hidden_size}; train the head again with "
            "train.head"
        )
    return traverse_util.unflatten_dict(
        {
            path: to_device(leaf, TensorSpec((HEAD, *path), leaf.shape), mesh)
            for path, leaf in flat.items()
        }
    )


def _fits(flat: dict[tuple[str, ...], np.ndarray], config: ModelConfig) -> bool:
    """Whether these are the leaves of a head of either kind and any rank."""
    sizes = {path: leaf.shape for path, leaf in flat.items()}
    floats = all(leaf.dtype == np.float32 for leaf in flat.values())
    ranks = {shape[1] for shape in sizes.values() if len(shape) == 2}
    return floats and any(sizes == shapes(config, kind, rank) for kind in KINDS for rank in ranks)
