"""The pairwise head's file: bit for bit, beside weights that do not change, or refused by name."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import orthrus_jax
from orthrus_jax import convert
from orthrus_jax.checkpoint import (
    HEAD_FILE,
    load_checkpoint,
    open_view,
    save_checkpoint,
    save_head,
    save_view,
)
from orthrus_jax.errors import UserError
from orthrus_jax.model.pairwise import HEAD, KINDS
from tests.support.compare import flat, same_bits
from tests.support.configs import tiny_config
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_head, random_params

CONFIG = tiny_config(vocab_size=300, mask_token_id=299)
TREE = random_params(CONFIG, 1)


@pytest.fixture
def saved(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model with a head of tables."""
    tokenizer = small_tokenizer(["one two"] * 3, 290)
    head = random_head(CONFIG, 2)
    save_checkpoint(tmp_path / "model", CONFIG, TREE, head=head, tokenizer=tokenizer)
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_head_comes_back_bit_for_bit_and_is_no_part_of_the_views(tmp_path, kind: str) -> None:
    head = random_head(CONFIG, 2, kind=kind)
    save_checkpoint(tmp_path / "with", CONFIG, TREE, head=head)
    save_checkpoint(tmp_path / "without", CONFIG, TREE)
    loaded = load_checkpoint(tmp_path / "with", dtype="bfloat16")
    ours, theirs = flat(loaded.head), flat(head)
    assert ours.keys() == theirs.keys()
    assert all(same_bits(ours[name], theirs[name]) for name in ours)
    assert HEAD not in loaded.params
    assert load_checkpoint(tmp_path / "without").head is None
    # What other loaders read is the same, byte for byte.
    files = {path.name: path.read_bytes() for path in (tmp_path / "with").iterdir()}
    files.pop(HEAD_FILE)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "without").iterdir()}


def test_loaded_model_drafts_with_its_head(saved) -> None:
    model = orthrus_jax.load(saved)
    assert same_bits(model.params[HEAD]["scale"], random_head(CONFIG, 2)["scale"])
    assert model.engine.resolve(orthrus_jax.Strategy()).pairwise


def test_conversion_keeps_the_head(saved, tmp_path) -> None:
    args = ["--from", str(saved), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"]
    convert.main(args, progress=False)
    assert (tmp_path / "half" / HEAD_FILE).read_bytes() == (saved / HEAD_FILE).read_bytes()


def test_view_saved_alone_brings_its_head_and_not_the_bases(saved, tmp_path) -> None:
    """Whatever head lies beside the base that it is merged with."""
    view = orthrus_jax.save_view(orthrus_jax.load(saved), tmp_path / "view.safetensors")
    save_head(saved, random_head(CONFIG, 9))
    merged = orthrus_jax.load(saved, view=view)
    ours, theirs = flat(merged.params[HEAD]), flat(random_head(CONFIG, 2))
    assert all(same_bits(ours[name], theirs[name]) for name in theirs)
    plain = save_view(tmp_path / "plain", CONFIG, TREE)
    assert load_checkpoint(saved, view=open_view(plain)).head is None


@pytest.mark.parametrize(
    "damage", ["cut short", "another vocabulary", "a tensor missing", "halves"]
)
def test_head_that_does_not_fit_is_refused_by_name(saved, damage: str) -> None:
    path = saved / HEAD_FILE
    if damage == "cut short":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "another vocabulary":
        save_head(saved, random_head(tiny_config(vocab_size=301, mask_token_id=300), 1))
    else:
        tensors = load_file(path)
        if damage == "halves":
            tensors = {name: x.astype(np.float16) for name, x in tensors.items()}
        else:
            tensors.pop(f"{HEAD}.none")
        save_file(tensors, path)
    with pytest.raises(UserError, match=f"{HEAD_FILE} (is not a readable|does not fit)"):
        load_checkpoint(saved)
