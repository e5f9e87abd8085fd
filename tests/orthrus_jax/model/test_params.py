"""The trained parameters, their initial values, and their names in a checkpoint."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from orthrus_jax.checkpoint import tensor_specs
from orthrus_jax.config import PRESETS
from orthrus_jax.model import Model, Segment, View, ar_segment
from orthrus_jax.model import params as params_lib
from tests.support.compare import flat, relative_error, same_bits
from tests.support.configs import tiny_config
from tests.support.weights import random_params

TIED, UNTIED = tiny_config(), tiny_config(tie_word_embeddings=False)
BIASED = tiny_config(qk_norm=False, attention_bias=True)  # the switches of a Qwen2
CONFIGS = {"tied": TIED, "untied": UNTIED, "biased": BIASED}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


def attention_leaves(config) -> set[tuple[str, str]]:
    """Module and leaf of every parameter of one attention view in one layer."""
    leaves = {(name, "weight") for name in ATTENTION if name.endswith("proj")}
    if config.attention_bias:
        leaves |= {(f"{name}_proj", "bias") for name in "qkv"}
    if config.qk_norm:
        leaves |= {("q_norm", "weight"), ("k_norm", "weight")}
    return leaves


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


@pytest.fixture(scope="module")
def whole(config) -> dict:
    return params_lib.init(Model(config), jax.random.key(0))


def test_split_is_a_partition_and_merge_its_inverse(whole: dict) -> None:
    frozen, diffusion = params_lib.split(whole)
    assert not set(flat(frozen)) & set(flat(diffusion))
    assert set(flat(frozen)) | set(flat(diffusion)) == set(flat(whole))
    merged = params_lib.merge(frozen, diffusion)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    for path, leaf in flat(merged).items():
        assert leaf is flat(whole)[path], f"{path} was copied"
    assert params_lib.count(frozen) + params_lib.count(diffusion) == params_lib.count(whole)


def test_trained_subtree_is_the_diffusion_attention_of_every_layer(whole: dict, config) -> None:
    _, diffusion = params_lib.split(whole)
    assert set(flat(diffusion)) == {
        f"layers_{layer}/self_attn_diff/{module}/{leaf}"
        for layer in range(config.num_hidden_layers)
        for module, leaf in attention_leaves(config)
    }


def test_stack_and_unstack_are_inverse(whole: dict, config) -> None:
    for part in params_lib.split(whole):
        stacked = params_lib.stack(part)
        for path, leaf in flat(stacked["layers"]).items():
            assert leaf.shape == (config.num_hidden_layers, *flat(part["layers_0"])[path].shape)
        again = flat(params_lib.unstack(stacked))
        assert set(again) == set(flat(part))
        assert all(same_bits(again[path], leaf) for path, leaf in flat(part).items())


def test_frozen_module_of_the_diffusion_view_stays_whole() -> None:
    whole = random_params(BIASED, 3)
    frozen, diffusion = params_lib.split(whole, freeze=["q_proj"])
    moved = {path for path in flat(frozen) if "self_attn_diff" in path}
    assert moved == {
        f"layers_{i}/self_attn_diff/q_proj/{x}" for i in (0, 1) for x in ("weight", "bias")
    }
    assert not moved & set(flat(diffusion))


def test_diffusion_subtree_starts_as_a_bit_copy_in_buffers_of_its_own(whole: dict) -> None:
    frozen, diffusion = params_lib.split(whole)
    base = flat(frozen)
    for path, leaf in flat(diffusion).items():
        source = base[path.replace("self_attn_diff", "self_attn")]
        assert same_bits(leaf, source), path
        assert leaf.dtype == source.dtype == jnp.float32
        assert leaf is not source, f"{path}: donating one would delete the other"
        assert leaf.unsafe_buffer_pointer() != source.unsafe_buffer_pointer(), path


def test_fresh_matrices_are_random_norms_one_and_biases_zero(whole: dict) -> None:
    for path, leaf in flat(whole).items():
        value = np.asarray(leaf)
        if path.endswith("norm/weight"):
            assert (value == 1).all(), path
        elif path.endswith("bias"):
            assert (value == 0).all(), path
        else:
            assert 0.015 < value.std() < 0.025, path


@pytest.mark.parametrize("config", [TIED, BIASED], ids=["tied", "biased"])
def test_copied_view_with_blocks_of_one_row_is_the_ar_view(config) -> None:
    """A block of one row sees the same as an AR row: the rows before it, and itself."""
    model, params = Model(config), random_params(config, 3, copy=True)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 9)), jnp.int32)
    clean = ar_segment(tokens, jnp.zeros(2, jnp.int32))
    blocks = Segment(tokens, clean.positions, View.DIFFUSION, block=1)
    (ar, diffusion), _ = model.forward(params, [clean, blocks], None)
    assert relative_error(diffusion, ar) < 2e-5
    (_, other), _ = model.forward(random_params(config, 3), [clean, blocks], None)
    assert relative_error(other, ar) > 0.1  # weights of its own: the views do differ


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_tensor_specs_have_the_published_names(config) -> None:
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
        assert tree[spec.path] == spec.shape


def test_switches_change_their_own_tensors_alone() -> None:
    """A bias is named like its module: `q_proj.bias`, in the diffusion view `q_proj_diff.bias`."""
    heads, groups = 4 * 16, 2 * 16
    plain, biased, bare = (
        {name: spec.shape for name, spec in tensor_specs(config, diffusion=True).items()}
        for config in (TIED, tiny_config(attention_bias=True), tiny_config(qk_norm=False))
    )
    attention = [f"model.layers.{i}.self_attn." for i in range(2)]
    assert biased == plain | {
        f"{prefix}{name}_proj{view}.bias": (size,)
        for prefix in attention
        for view in ("", "_diff")
        for name, size in {"q": heads, "k": groups, "v": groups}.items()
    }
    norms = {f"{a}{n}_norm{view}.weight" for a in attention for n in "qk" for view in ("", "_diff")}
    assert bare == {name: shape for name, shape in plain.items() if name not in norms}
    specs = tensor_specs(tiny_config(attention_bias=True), diffusion=True)
    spec = specs["model.layers.1.self_attn.k_proj_diff.bias"]
    assert spec.path == ("layers_1", "self_attn_diff", "k_proj", "bias")


@pytest.mark.parametrize("switch", [{"attention_bias": True}, {"qk_norm": False}], ids=str)
def test_each_switch_changes_the_forward(switch: dict) -> None:
    """With equal weights wherever both models have them."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 9)), jnp.int32)
    clean = ar_segment(tokens, jnp.zeros(1, jnp.int32))
    config = tiny_config(**switch)
    ours, plain = flat(random_params(config, 3)), flat(random_params(TIED, 3))
    (hidden,), _ = Model(config).forward(random_params(config, 3), [clean], None)
    shared = {path: ours.get(path, leaf) for path, leaf in plain.items()}
    tree = traverse_util.unflatten_dict(shared, sep="/")
    (other,), _ = Model(TIED).forward(tree, [clean], None)
    assert relative_error(other, hidden) > 0.01


def test_shapes_are_those_of_the_initialised_tree(whole: dict, config) -> None:
    shapes = {"/".join(path): shape for path, shape in params_lib.shapes(config).items()}
    assert shapes == {path: leaf.shape for path, leaf in flat(whole).items()}


@pytest.mark.parametrize(
    ("preset", "percent"),
    [("qwen3-0.6b", 22.8), ("qwen3-1.7b", 17.0), ("qwen3-4b", 19.0), ("qwen3-8b", 15.6)],
)
def test_trainable_share_is_the_published_one(preset: str, percent: float) -> None:
    sizes = {path: math.prod(shape) for path, shape in params_lib.shapes(PRESETS[preset]).items()}
    trained = sum(size for path, size in sizes.items() if params_lib.DIFFUSION in path)
    assert round(100 * trained / sum(sizes.values()), 1) == percent
