"""The mesh and its rules; what runs on eight fake devices is tests/eight_devices.py."""

import types

import jax
import pytest
from jax.sharding import PartitionSpec as P

from orthrus_jax import params, sharding
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model
from tests.helpers import tiny_config


def mesh_of(**sizes):
    """Something with the shape of a mesh: rules need no devices."""
    return types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1} | sizes)


def specs(mesh, *, stacked=False, **changes):
    shape = jax.eval_shape(Model(tiny_config(**changes)).init, jax.random.key(0))
    shape = jax.eval_shape(params.stack, shape) if stacked else shape
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding.spec(path, leaf.shape, mesh), shape
    )


def test_the_rules_cut_widths_over_fsdp_and_heads_over_tensor():
    found = specs(mesh_of(fsdp=2, tensor=2), tie_word_embeddings=False)
    layer = found["layers_0"]
    assert found["embed_tokens"]["embedding"] == P("tensor", "fsdp")
    assert found["lm_head"]["kernel"] == P("fsdp", "tensor")
    assert layer["self_attn"]["q_proj"]["kernel"] == P("fsdp", "tensor")
    assert layer["self_attn_diff"]["o_proj"]["kernel"] == P("tensor", "fsdp")
    assert layer["mlp"]["down_proj"]["kernel"] == P("tensor", "fsdp")
    assert layer["input_layernorm"]["weight"] == P(None)


def test_stacked_layers_keep_their_first_axis_whole():
    found = specs(mesh_of(fsdp=2), stacked=True)
    assert found["layers"]["mlp"]["up_proj"]["kernel"] == P(None, "fsdp", "tensor")
    assert found["layers"]["self_attn"]["q_norm"]["weight"] == P(None, None)


def test_an_axis_that_does_not_divide_stays_whole():
    found = specs(mesh_of(fsdp=3, tensor=4))
    assert found["layers_0"]["mlp"]["up_proj"]["kernel"] == P(None, "tensor")


def test_a_mesh_takes_what_is_left():
    mesh = sharding.make_mesh(data=-1)
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (1, 7, 1), (2, 1, 5)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match="devices"):
        sharding.make_mesh(*sizes)


def test_a_tensor_axis_that_does_not_divide_the_model_is_refused():
    with pytest.raises(UserError, match="tensor=4 does not divide num_key_value_heads=2"):
        sharding.check(tiny_config(), mesh_of(tensor=4))
