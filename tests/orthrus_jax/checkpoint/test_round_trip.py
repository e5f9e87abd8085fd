"""Sound checkpoints: byte-exact round trips, dtypes, shards, and transformers both ways.

The safetensors library writes the files that the tests load, and reads those that we save.
"""

import json
import math
import pathlib
import tracemalloc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from orthrus_jax.checkpoint import (
    Checkpoint,
    config_to_hf,
    load_checkpoint,
    save_checkpoint,
    tensor_specs,
)
from orthrus_jax.config import DTYPES, ModelConfig
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, ar_segment
from orthrus_jax.model import params as params_lib
from tests.support.compare import flat, relative_error, same_bits
from tests.support.configs import FAMILIES, tiny_config
from tests.support.weights import random_params

TIED, UNTIED = (
    tiny_config(eos_token_ids=(7, 9), tie_word_embeddings=tied) for tied in (True, False)
)
Contents = dict[str, tuple[str, list[int], bytes]]  # name -> dtype, shape, bytes


def random_tensors(config: ModelConfig, *, diffusion: bool) -> dict[str, np.ndarray]:
    """Random checkpoint tensors, in the dtype of the config."""
    rng = np.random.default_rng(3)
    return {
        name: rng.normal(size=spec.shape).astype(jnp.dtype(config.dtype))
        for name, spec in tensor_specs(config, diffusion=diffusion).items()
    }


def write(
    directory: pathlib.Path, config: ModelConfig, tensors: dict[str, np.ndarray]
) -> pathlib.Path:
    """A checkpoint directory by the library's own writer."""
    directory.mkdir()
    orthrus = any("_diff" in name for name in tensors)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config, orthrus=orthrus)))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def contents(directory: pathlib.Path) -> Contents:
    """Everything the weight files of a directory hold."""
    held: Contents = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}, path
            for name in file.keys():  # noqa: SIM118
                assert name not in held, f"{name} is in two files"
                view = file.get_slice(name)
                tensor = file.get_tensor(name)
                held[name] = (view.get_dtype(), view.get_shape(), tensor.tobytes())
    return held


def logits(checkpoint: Checkpoint, tokens: np.ndarray) -> np.ndarray:
    model = Model(checkpoint.config)
    segment = ar_segment(jnp.asarray(tokens), jnp.zeros(len(tokens), jnp.int32))
    hidden, _ = model.forward(checkpoint.params, [segment], None)
    return np.asarray(model.logits(checkpoint.params, hidden[0]))


def read(path: pathlib.Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("limit", [10**9, 10_000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diffusion", [False, True], ids=["qwen3", "orthrus"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip_is_byte_exact(
    tmp_path: pathlib.Path, tied: bool, diffusion: bool, dtype: str, limit: int
) -> None:
    config = tiny_config(
        tie_word_embeddings=tied,
        dtype=dtype,
        eos_token_ids=(7, 9),
        block_size=8 if diffusion else 32,  # a Qwen3's config.json has none: 32 by default
    )
    check_round_trip(tmp_path, config, diffusion, limit)


@pytest.mark.parametrize("diffusion", [False, True], ids=["base", "orthrus"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen3"])
def test_round_trip_of_each_family_is_byte_exact(
    tmp_path: pathlib.Path, family: str, diffusion: bool
) -> None:
    block = 8 if diffusion else 32
    config = tiny_config(**FAMILIES[family], block_size=block, dtype="bfloat16")
    check_round_trip(tmp_path, config, diffusion, 10**9)
    written = read(tmp_path / "copy" / "config.json")
    assert written["model_type"] == config.model_type
    if diffusion:
        views = [
            name.replace("_diff", "") for name in contents(tmp_path / "copy") if "_diff." in name
        ]
        assert set(views) == {
            n for n in contents(tmp_path / "copy") if ".self_attn." in n and "_diff." not in n
        }


def check_round_trip(
    tmp_path: pathlib.Path, config: ModelConfig, diffusion: bool, limit: int
) -> None:
    """A directory of the library's own writer, loaded and saved again, holds the same bytes."""
    tensors = random_tensors(config, diffusion=diffusion)
    source = write(tmp_path / "source", config, tensors)
    loaded = load_checkpoint(source)
    assert loaded.config == config
    assert {str(leaf.dtype) for leaf in flat(loaded.params).values()} == {config.dtype}
    kept = loaded.params if diffusion else params_lib.split(loaded.params)[0]
    save_checkpoint(tmp_path / "copy", loaded.config, kept, max_shard_bytes=limit)
    assert contents(tmp_path / "copy") == contents(source)
    assert read(tmp_path / "copy" / "config.json") == read(source / "config.json")
    again = load_checkpoint(tmp_path / "copy")
    assert again.trained == diffusion
    for path, leaf in flat(again.params).items():
        assert same_bits(leaf, flat(loaded.params)[path]), path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_bit_pattern_survives(tmp_path: pathlib.Path, dtype: str) -> None:
    config = tiny_config(vocab_size=2048, tie_word_embeddings=False, dtype=dtype)
    tensors = random_tensors(config, diffusion=False)
    patterns = np.arange(65_536, dtype=np.uint16).view(jnp.dtype(dtype)).reshape(2048, 32)
    tensors |= {"model.embed_tokens.weight": patterns, "lm_head.weight": patterns}
    source = write(tmp_path / "source", config, tensors)
    frozen, _ = params_lib.split(load_checkpoint(source).params)
    assert same_bits(frozen["lm_head"]["weight"], patterns)
    save_checkpoint(tmp_path / "copy", config, frozen)
    assert contents(tmp_path / "copy") == contents(source)


def test_saved_tensors_have_the_published_names(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path / "out", UNTIED, random_params(UNTIED, 1))
    linear = [f"{name}_proj" for name in "qkvo"]
    attention = [*linear, "q_norm", "k_norm"]
    layer = [
        "input_layernorm",
        "post_attention_layernorm",
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
        *(f"self_attn.{name}" for name in attention),
        *(f"self_attn.{name}_diff" for name in attention),
    ]
    names = {f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in layer}
    names |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    held = contents(tmp_path / "out")
    assert set(held) == names
    assert held["model.layers.0.self_attn.q_proj_diff.weight"][:2] == ("F32", [64, 32])
    assert held["model.layers.0.self_attn.k_norm_diff.weight"][:2] == ("F32", [16])
    written = read(tmp_path / "out" / "config.json")
    assert written["architectures"] == ["OrthrusLM"]
    assert (written["block_size"], written["mask_token_id"]) == (4, 63)
    assert read(tmp_path / "out" / "generation_config.json") == {"eos_token_id": [7, 9]}


def test_shards_stay_below_the_limit_and_the_index_lists_their_tensors(
    tmp_path: pathlib.Path,
) -> None:
    limit = 20_000
    save_checkpoint(tmp_path / "out", TIED, random_params(TIED, 1), max_shard_bytes=limit)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00009.safetensors" for i in range(1, 10)]
    index = read(tmp_path / "out" / "model.safetensors.index.json")
    held = contents(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in held.values())
    assert set(index["weight_map"]) == set(held)
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="np") as shard:
            assert {n for n, f in index["weight_map"].items() if f == file} == set(shard.keys())
            assert sum(len(held[name][2]) for name in shard.keys()) <= limit  # noqa: SIM118
            header_end = 8 + int.from_bytes((tmp_path / "out" / file).read_bytes()[:8], "little")
            assert header_end % 8 == 0, "tensor data is not aligned"


def test_tensor_above_the_limit_gets_a_shard_of_its_own(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path / "out", TIED, random_params(TIED, 1), max_shard_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(contents(tmp_path / "out"))
    assert len(load_checkpoint(tmp_path / "out").params) == len(random_params(TIED, 1))


def test_dtype_is_cast_to_nearest_and_written_to_config_json(tmp_path: pathlib.Path) -> None:
    tree = random_params(TIED, 1)
    save_checkpoint(tmp_path / "out", TIED, tree, dtype="bfloat16")
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"
    assert {dtype for dtype, _, _ in contents(tmp_path / "out").values()} == {"BF16"}
    loaded = load_checkpoint(tmp_path / "out", dtype="float32")
    assert loaded.config.dtype == "float32"
    for path, leaf in flat(loaded.params).items():
        rounded = np.asarray(flat(tree)[path]).astype(jnp.bfloat16).astype(np.float32)
        assert same_bits(leaf, rounded), path
    half = load_checkpoint(tmp_path / "out", dtype="float16")
    assert {str(leaf.dtype) for leaf in flat(half.params).values()} == {"float16"}


def test_files_of_another_dtype_are_cast_to_that_of_the_config(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(TIED, diffusion=False)
    norm = tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    loaded = load_checkpoint(write(tmp_path / "mixed", TIED, tensors))
    assert same_bits(loaded.params["norm"]["weight"], norm.astype(np.float32))


def test_config_json_has_the_dtype_of_the_leaves(tmp_path: pathlib.Path) -> None:
    save_checkpoint(tmp_path / "out", tiny_config(dtype="bfloat16"), random_params(TIED, 1))
    assert read(tmp_path / "out" / "config.json")["dtype"] == "float32"
    assert {dtype for dtype, _, _ in contents(tmp_path / "out").values()} == {"F32"}


def test_leaves_of_several_dtypes_are_refused_unless_one_is_chosen(tmp_path: pathlib.Path) -> None:
    tree = random_params(TIED, 1)
    tree = tree | {"norm": {"weight": tree["norm"]["weight"].astype(jnp.bfloat16)}}
    with pytest.raises(UserError, match="bfloat16 and float32: choose one dtype"):
        save_checkpoint(tmp_path / "out", TIED, tree)
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "out", TIED, tree, dtype="float16")
    assert {dtype for dtype, _, _ in contents(tmp_path / "out").values()} == {"F16"}


def test_weights_too_large_for_float16_are_refused_both_ways(tmp_path: pathlib.Path) -> None:
    tree = random_params(TIED, 1)
    tree = tree | {"norm": {"weight": tree["norm"]["weight"].at[3].set(1e5)}}
    with pytest.raises(UserError, match=r"model\.norm\.weight holds weights beyond 65504"):
        save_checkpoint(tmp_path / "out", TIED, tree, dtype="float16")
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path / "out", TIED, tree)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds weights beyond 65504"):
        load_checkpoint(tmp_path / "out", dtype="float16")


def test_tree_of_another_config_is_a_bug_that_names_the_path(tmp_path: pathlib.Path) -> None:
    tree = random_params(TIED, 1)
    with pytest.raises(ValueError, match="lm_head/weight") as raised:
        save_checkpoint(tmp_path / "out", UNTIED, tree)
    assert not isinstance(raised.value, UserError)
    part = {**tree, "layers_1": dict(tree["layers_1"], self_attn_diff={})}
    with pytest.raises(ValueError, match="layers_1/self_attn_diff/k_norm/weight"):
        save_checkpoint(tmp_path / "out", TIED, part)


def test_qwen3_gets_a_diffusion_view_that_is_a_copy(tmp_path: pathlib.Path) -> None:
    loaded = load_checkpoint(write(tmp_path / "q", TIED, random_tensors(TIED, diffusion=False)))
    assert not loaded.trained
    assert loaded.directory == tmp_path / "q"
    leaves = flat(loaded.params)
    assert {p: leaf.shape for p, leaf in leaves.items()} == {
        "/".join(path): shape for path, shape in params_lib.shapes(TIED).items()
    }
    for path, leaf in leaves.items():
        assert same_bits(leaf, leaves[path.replace("self_attn_diff", "self_attn")]), path


def test_trained_means_that_some_diffusion_weight_has_moved(tmp_path: pathlib.Path) -> None:
    tree = random_params(TIED, 1, copy=True)
    save_checkpoint(tmp_path / "copy", TIED, tree)
    assert not load_checkpoint(tmp_path / "copy").trained
    tree = params_lib.merge(tree, {})  # a tree of its own to change
    norm = tree["layers_1"]["self_attn_diff"]["q_norm"]
    norm["weight"] = norm["weight"].at[0].add(1.0)
    save_checkpoint(tmp_path / "moved", TIED, tree)
    assert load_checkpoint(tmp_path / "moved").trained


@pytest.mark.parametrize("diffusion", [False, True], ids=["qwen3", "orthrus"])
def test_donating_the_loaded_diffusion_view_leaves_the_base(
    tmp_path: pathlib.Path, diffusion: bool
) -> None:
    source = write(tmp_path / "q", TIED, random_tensors(TIED, diffusion=diffusion))
    frozen, trained = params_lib.split(load_checkpoint(source).params)
    step = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)
    step(trained)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(trained))
    save_checkpoint(tmp_path / "base", TIED, frozen)
    held = contents(source)
    assert contents(tmp_path / "base") == {n: held[n] for n in held if "_diff" not in n}


def test_one_tensor_at_a_time_is_on_the_host(tmp_path: pathlib.Path) -> None:
    config = tiny_config(
        vocab_size=4096, hidden_size=512, intermediate_size=2048, num_hidden_layers=4
    )
    tensors = random_tensors(config, diffusion=False)
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert sum(tensor.nbytes for tensor in tensors.values()) > 5 * largest
    write(tmp_path / "q", config, tensors)
    del tensors
    load_checkpoint(tmp_path / "q")  # imports and compiles
    tracemalloc.start()
    try:
        frozen, _ = params_lib.split(load_checkpoint(tmp_path / "q").params)
        assert tracemalloc.get_traced_memory()[1] < 2 * largest + 2**21
        tracemalloc.reset_peak()
        save_checkpoint(tmp_path / "out", config, frozen, dtype="bfloat16")
        assert tracemalloc.get_traced_memory()[1] < 2 * largest + 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("family", "tied", "shard"),
    [
        *[("qwen3", tied, shard) for tied in (True, False) for shard in ("1GB", "20KB")],
        *[(name, False, "1GB") for name in FAMILIES if name != "qwen3"],
    ],
)
def test_model_saved_by_transformers_gives_its_logits(
    tmp_path: pathlib.Path, family: str, tied: bool, shard: str
) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = tiny_config(tie_word_embeddings=tied, eos_token_ids=(7, 9), **FAMILIES[family])
    raw = config_to_hf(config, orthrus=False)
    hf = transformers.AutoConfig.for_model(**raw, initializer_range=0.3)
    theirs = getattr(transformers, raw["architectures"][0])(hf).to(torch.float32).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size=shard)
    assert (tmp_path / "hf" / "model.safetensors").exists() == (shard == "1GB")
    tokens = np.random.default_rng(0).integers(0, 64, (2, 11))
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)).logits.numpy()
    loaded = load_checkpoint(tmp_path / "hf")
    assert loaded.config.rope_scaling == config.rope_scaling
    assert math.isclose(loaded.config.rope_theta, config.rope_theta)
    assert relative_error(logits(loaded, tokens), reference) < 2e-5


@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["single", "sharded"])
@pytest.mark.parametrize(
    "config",
    [
        TIED,
        UNTIED,
        *(tiny_config(eos_token_ids=(7, 9), **changes) for changes in FAMILIES.values()),
    ],
    ids=["tied", "untied", *FAMILIES],
)
def test_transformers_loads_a_saved_base(
    tmp_path: pathlib.Path, config: ModelConfig, limit: int
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    whole = random_params(config, 4)
    frozen, _ = params_lib.split(whole)
    save_checkpoint(tmp_path / "out", config, frozen, max_shard_bytes=limit)
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.generation_config.eos_token_id == [7, 9]
    tokens = np.random.default_rng(0).integers(0, 64, (2, 11))
    with torch.no_grad():
        reference = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    ours = logits(Checkpoint(config, whole, False, tmp_path), tokens)
    assert relative_error(ours, reference) < 2e-5
