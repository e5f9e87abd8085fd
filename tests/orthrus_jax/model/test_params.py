"""Which parameters are trained, what they start as, and what a checkpoint calls them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.checkpoint import tensor_specs
from orthrus_jax.config import PRESETS
from orthrus_jax.model import Model, Segment, View, ar_segment
from orthrus_jax.model import params as params_lib
from tests.support.compare import flat, relative_error, same_bits
from tests.support.configs import tiny_config
from tests.support.weights import random_params

TIED, UNTIED = tiny_config(), tiny_config(tie_word_embeddings=False)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


@pytest.fixture(scope="module", params=[TIED, UNTIED], ids=["tied", "untied"])
def whole(request) -> dict:
    return params_lib.init(Model(request.param), jax.random.key(0))


def test_split_is_a_partition_and_merge_its_inverse(whole: dict) -> None:
    frozen, diffusion = params_lib.split(whole)
    assert not set(flat(frozen)) & set(flat(diffusion))
    assert set(flat(frozen)) | set(flat(diffusion)) == set(flat(whole))
    merged = params_lib.merge(frozen, diffusion)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    for path, leaf in flat(merged).items():
        assert leaf is flat(whole)[path], f"{path} was copied"
    assert params_lib.count(frozen) + params_lib.count(diffusion) == params_lib.count(whole)


def test_the_trained_subtree_is_the_diffusion_attention_of_every_layer(whole: dict) -> None:
    _, diffusion = params_lib.split(whole)
    leaf = {name: "weight" if name.endswith("norm") else "kernel" for name in ATTENTION}
    assert set(flat(diffusion)) == {
        f"layers_{layer}/self_attn_diff/{name}/{leaf[name]}"
        for layer in range(TIED.num_hidden_layers)
        for name in ATTENTION
    }


def test_the_diffusion_subtree_starts_as_a_bit_copy_in_buffers_of_its_own(whole: dict) -> None:
    frozen, diffusion = params_lib.split(whole)
    base = flat(frozen)
    for path, leaf in flat(diffusion).items():
        source = base[path.replace("self_attn_diff", "self_attn")]
        assert same_bits(leaf, source), path
        assert leaf.dtype == source.dtype == jnp.float32
        assert leaf is not source, f"{path}: donating one would delete the other"
        assert leaf.unsafe_buffer_pointer() != source.unsafe_buffer_pointer(), path


def test_fresh_weights_are_random_where_they_are_matrices(whole: dict) -> None:
    for path, leaf in flat(whole).items():
        value = np.asarray(leaf)
        if path.endswith("weight"):
            assert (value == 1).all(), path
        else:
            assert 0.015 < value.std() < 0.025, path


def test_a_copied_view_with_a_block_of_one_row_is_the_ar_view() -> None:
    """A block that is one row sees what an AR row sees: the rows before it, and itself."""
    model, params = Model(TIED), random_params(TIED, 3, copy=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)
    clean = ar_segment(tokens, jnp.zeros(2, jnp.int32))
    blocks = Segment(tokens, clean.positions, View.DIFFUSION, block=1)
    (ar, diffusion), _ = model.forward(params, [clean, blocks], None)
    assert relative_error(diffusion, ar) < 2e-5
    (_, other), _ = model.forward(random_params(TIED, 3), [clean, blocks], None)
    assert relative_error(other, ar) > 0.1  # weights of its own: the views do differ


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_checkpoint_names_are_the_published_ones(config) -> None:
    layer = [
        "input_layernorm",
        "post_attention_layernorm",
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        *(f"self_attn.{name}" for name in ATTENTION),
    ]
    base = {"model.embed_tokens.weight", "model.norm.weight"}
    base |= {f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer}
    if config is UNTIED:
        base.add("lm_head.weight")
    extra = {
        f"model.layers.{i}.self_attn.{name}_diff.weight" for i in range(2) for name in ATTENTION
    }
    assert set(tensor_specs(config, diffusion=False)) == base
    assert set(tensor_specs(config, diffusion=True)) == base | extra


def test_tensor_specs_give_the_checkpoint_shape_and_the_place_in_the_tree() -> None:
    specs = tensor_specs(UNTIED, diffusion=True)
    heads, groups, width = 4 * 16, 2 * 16, 32
    shapes = {
        "model.embed_tokens": (64, width),
        "lm_head": (64, width),
        "model.layers.1.self_attn.q_proj": (heads, width),
        "model.layers.1.self_attn.k_proj_diff": (groups, width),
        "model.layers.1.self_attn.v_proj": (groups, width),
        "model.layers.1.self_attn.o_proj_diff": (width, heads),
        "model.layers.1.self_attn.q_norm_diff": (16,),
        "model.layers.1.mlp.down_proj": (width, 48),
        "model.layers.1.input_layernorm": (width,),
    }
    assert {name: specs[f"{name}.weight"].shape for name in shapes} == shapes
    tree = params_lib.shapes(UNTIED)
    assert {spec.path for spec in specs.values()} == set(tree)
    for spec in specs.values():
        assert tree[spec.path] == (spec.shape[::-1] if spec.transpose else spec.shape)
        assert spec.transpose == (spec.path[-1] == "kernel")


def test_shapes_are_those_of_the_initialised_tree(whole: dict) -> None:
    config = UNTIED if "lm_head" in whole else TIED
    shapes = {"/".join(path): shape for path, shape in params_lib.shapes(config).items()}
    assert shapes == {path: leaf.shape for path, leaf in flat(whole).items()}


@pytest.mark.parametrize(
    ("preset", "percent"),
    [("qwen3-0.6b", 22.8), ("qwen3-1.7b", 17.0), ("qwen3-4b", 19.0), ("qwen3-8b", 15.6)],
)
def test_the_trainable_share_is_the_published_one(preset: str, percent: float) -> None:
    sizes = {path: math.prod(shape) for path, shape in params_lib.shapes(PRESETS[preset]).items()}
    trained = sum(size for path, size in sizes.items() if params_lib.DIFFUSION in path)
    assert round(100 * trained / sum(sizes.values()), 1) == percent
