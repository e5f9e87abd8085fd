"""The mesh and its rules, and serving on eight fake devices (support/programs/serve_on_8.py)."""

import json
import subprocess
import sys
import types

import jax
import pytest
from jax.sharding import PartitionSpec as P

from orthrus_jax import sharding
from orthrus_jax.checkpoint import save_checkpoint
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, params
from tests.support.configs import tiny_config
from tests.support.marks import slow
from tests.support.paths import ROOT
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params


def mesh_of(**sizes):
    """Something with the shape of a mesh: rules need no devices."""
    return types.SimpleNamespace(shape={"data": 1, "fsdp": 1, "tensor": 1} | sizes)


def specs(mesh, *, stacked=False, **changes):
    shape = jax.eval_shape(Model(tiny_config(**changes)).init, jax.random.key(0))
    shape = jax.eval_shape(params.stack, shape) if stacked else shape
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: sharding.param_spec(path, leaf.shape, mesh), shape
    )


def test_rules_cut_widths_over_fsdp_and_heads_over_tensor():
    tree = specs(mesh_of(fsdp=2, tensor=2), tie_word_embeddings=False)
    layer = tree["layers_0"]
    assert tree["embed_tokens"]["embedding"] == P("tensor", "fsdp")
    assert tree["lm_head"]["weight"] == P("tensor", "fsdp")
    assert layer["self_attn"]["q_proj"]["weight"] == P("tensor", "fsdp")
    assert layer["self_attn_diff"]["o_proj"]["weight"] == P("fsdp", "tensor")
    assert layer["mlp"]["down_proj"]["weight"] == P("fsdp", "tensor")
    assert layer["input_layernorm"]["weight"] == P(None)


def test_stacked_layers_keep_their_first_axis_whole():
    tree = specs(mesh_of(fsdp=2), stacked=True)
    assert tree["layers"]["mlp"]["up_proj"]["weight"] == P(None, "tensor", "fsdp")
    assert tree["layers"]["self_attn"]["q_norm"]["weight"] == P(None, None)


def test_axis_that_does_not_divide_stays_whole():
    tree = specs(mesh_of(fsdp=3, tensor=4))
    assert tree["layers_0"]["mlp"]["up_proj"]["weight"] == P("tensor", None)


def test_mesh_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh(data=-1)
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (1, 7, 1), (2, 1, 5)])
def test_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match="devices"):
        sharding.make_mesh(*sizes)


def test_tensor_axis_that_does_not_divide_the_model_is_refused():
    with pytest.raises(UserError, match="tensor=4 does not divide num_key_value_heads=2"):
        sharding.check_divides(tiny_config(), mesh_of(tensor=4))


SERVED = {
    "a few": ("orthrus,a tree ahead,dialogue,quantised", "one", "2 x 2 x 2"),
    "all": (
        "ar,orthrus,a tree ahead,coupled,rejection,dialogue,quantised",
        "one",
        "4 x 1 x 2",
        "8 x 1 x 1",
        "1 x 4 x 2",
    ),
}


@pytest.fixture(scope="module", params=["a few", *slow("all")])
def served(request, tmp_path_factory):
    config = tiny_config(vocab_size=300, mask_token_id=299, tie_word_embeddings=False)
    directory = tmp_path_factory.mktemp("model") / "tiny"
    save_checkpoint(
        directory, config, random_params(config, 3), tokenizer=small_tokenizer(["a few words"], 300)
    )
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.support.programs.serve_on_8",
            str(directory),
            *SERVED[request.param],
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def test_served_text_equals_that_of_one_device(served):
    texts = {
        mesh: {way: text for way, text in run.items() if way not in ("pieces", "shape")}
        for mesh, run in served.items()
    }
    assert {len(text) for text in texts["one"]["orthrus"]} == {12}
    assert all(by_way == texts["one"] for by_way in texts.values())


def test_served_weights_lie_where_the_rules_say(served):
    for mesh, run in served.items():
        _, fsdp, tensor = (1, 1, 1) if mesh == "one" else map(int, mesh.split(" x "))
        width, heads = run["shape"]
        assert run["pieces"] == [[width // fsdp, heads // tensor]]
