"""Views apart from their bases: written, merged, and held to the base they were trained for."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import orthrus_jax
from orthrus_jax.checkpoint import load_checkpoint, open_view, save_checkpoint, save_view
from orthrus_jax.convert import main
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from orthrus_jax.model import params as params_lib
from tests.support.compare import flat, relative_error, same_bits
from tests.support.configs import FAMILIES, tiny_config
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

CONFIG = tiny_config(**FAMILIES["qwen2"], vocab_size=300, mask_token_id=299, block_size=4)
TREE = random_params(CONFIG, 1)


@pytest.fixture
def base(tmp_path: pathlib.Path) -> pathlib.Path:
    """The base alone: its config.json has the default block and no view."""
    tokenizer = small_tokenizer(["a few words of text"], 290)
    config = dataclasses.replace(CONFIG, block_size=32)
    tree = params_lib.split(TREE)[0]
    save_checkpoint(tmp_path / "base", config, tree, tokenizer=tokenizer)
    return tmp_path / "base"


def near(trees: tuple[dict, dict]) -> float:
    """The largest difference between the diffusion views of two trees."""
    ours, theirs = (flat(params_lib.split(tree)[1]) for tree in trees)
    return max(float(jnp.abs(ours[path] - theirs[path]).max()) for path in theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_view_alone_and_its_base_are_the_whole_model(tmp_path, family: str) -> None:
    config = tiny_config(**FAMILIES[family])
    tree = random_params(config, 2)
    save_checkpoint(tmp_path / "base", config, params_lib.split(tree)[0])
    path = save_view(tmp_path / "view", config, tree)
    assert path == tmp_path / "view" / "view.safetensors"
    names = set(load_file(path))
    save_checkpoint(tmp_path / "whole", config, tree)
    published = load_file(tmp_path / "whole" / "model.safetensors")
    assert names == {name for name in published if "_diff." in name}
    loaded = load_checkpoint(tmp_path / "base", view=open_view(tmp_path / "view"))
    assert loaded.config == config
    assert loaded.trained
    for name, leaf in flat(tree).items():
        assert same_bits(flat(loaded.params)[name], leaf), name


def test_merging_writes_the_published_layout(base, tmp_path, capsys) -> None:
    save_checkpoint(tmp_path / "whole", CONFIG, TREE)
    main(
        ["--from", str(tmp_path / "whole"), "--to", str(tmp_path / "v.safetensors")], progress=False
    )
    assert "a diffusion view alone, " in capsys.readouterr().out
    command = ["--from", str(base), "--view", str(tmp_path / "v.safetensors")]
    main([*command, "--to", str(tmp_path / "merged")], progress=False)
    whole, merged = (load_file(tmp_path / d / "model.safetensors") for d in ("whole", "merged"))
    assert whole.keys() == merged.keys()
    assert all(same_bits(whole[name], merged[name]) for name in whole)
    written, config = (
        json.loads((tmp_path / d / "config.json").read_text()) for d in ("merged", "whole")
    )
    assert written == config
    assert (tmp_path / "merged" / "tokenizer.json").exists()


def test_differences_are_taken_before_they_are_rounded(base, tmp_path) -> None:
    """A view near its base: rounded first, most of what it learnt would be gone."""
    twin = random_params(CONFIG, 1, copy=True)
    frozen, diffusion = params_lib.split(twin)
    moved = params_lib.merge(frozen, jax.tree.map(lambda leaf: leaf * 1.0005, diffusion))
    save_checkpoint(tmp_path / "whole", CONFIG, moved)
    flags = ["--to", str(tmp_path / "v.safetensors"), "--rank", "64", "--dtype", "bfloat16"]
    main(["--from", str(tmp_path / "whole"), *flags], progress=False)
    merged = load_checkpoint(base, view=open_view(tmp_path / "v.safetensors")).params
    kernel = lambda tree: tree["layers_0"]["self_attn_diff"]["q_proj"]["weight"]
    learnt = kernel(moved) - kernel(twin)
    assert relative_error(kernel(merged) - kernel(twin), learnt) < 0.02


def test_loaded_view_drafts_the_bases_own_text(base, tmp_path) -> None:
    whole = LLM(CONFIG, TREE)
    path = orthrus_jax.save_view(whole, tmp_path / "v.safetensors")
    model = orthrus_jax.load(base, view=path)
    assert (model.trained, model.config.block_size) == (True, 4)
    prompts = [[3, 4, 5], [9] * 7]
    texts = [c.tokens for c in model.complete(prompts, max_new_tokens=12)]
    assert texts == [c.tokens for c in whole.complete(prompts, max_new_tokens=12)]
    assert texts == [c.tokens for c in model.complete(prompts, max_new_tokens=12, strategy="ar")]


def test_differences_of_low_rank_keep_what_has_that_rank(base, tmp_path) -> None:
    twin = flat(random_params(CONFIG, 1, copy=True))
    rng, tree = np.random.default_rng(0), {}
    for name, leaf in twin.items():
        tree[name] = leaf
        if "self_attn_diff" in name and leaf.ndim == 2:
            a, b = rng.normal(size=(leaf.shape[0], 3)), rng.normal(size=(3, leaf.shape[1]))
            tree[name] = leaf + jnp.asarray(0.1 * a @ b, jnp.float32)
    from flax import traverse_util

    whole = traverse_util.unflatten_dict(tree, sep="/")
    sizes = {}
    for rank in (1, 3, None):
        path = save_view(tmp_path / f"{rank}.safetensors", CONFIG, whole, rank=rank)
        merged = load_checkpoint(base, view=open_view(path)).params
        sizes[rank] = path.stat().st_size
        error = near((merged, whole))
        assert error < 1e-5 if rank != 1 else error > 0.1
    assert sizes[1] < sizes[3] < sizes[None]
    with safe_open(tmp_path / "3.safetensors", framework="np") as file:
        assert file.get_slice("model.layers.0.self_attn.q_proj_diff.weight_a").get_shape() == [
            3,
            32,
        ]
        assert file.get_slice("model.layers.0.self_attn.q_proj_diff.weight_b").get_shape() == [
            64,
            3,
        ]
        assert json.loads(file.metadata()["orthrus_view"])["rank"] == 3


def test_rank_above_a_matrix_keeps_all_of_it(base, tmp_path) -> None:
    path = save_view(tmp_path / "v.safetensors", CONFIG, TREE, rank=1000)
    assert near((load_checkpoint(base, view=open_view(path)).params, TREE)) < 1e-4


def test_same_base_in_another_dtype_is_the_same_base(base, tmp_path) -> None:
    path = save_view(tmp_path / "v.safetensors", CONFIG, TREE, dtype="bfloat16")
    half = load_checkpoint(base, dtype="bfloat16", view=open_view(path))
    assert half.trained
    assert {str(leaf.dtype) for leaf in flat(half.params).values()} == {"bfloat16"}
    main(["--from", str(base), "--to", str(tmp_path / "b"), "--dtype", "bfloat16"], progress=False)
    assert load_checkpoint(tmp_path / "b", dtype="float32", view=open_view(path)).trained


def test_view_of_another_base_is_refused_and_says_what_differs(base, tmp_path) -> None:
    other = tiny_config(**FAMILIES["llama"])
    path = save_view(tmp_path / "other.safetensors", other, random_params(other, 1))
    with pytest.raises(UserError) as error:
        load_checkpoint(base, view=open_view(path))
    assert "was trained for another base: vocab_size=300 (the view's base: 64)" in str(error.value)
    assert "attention_bias=True (the view's base: False)" in str(error.value)
    moved = dict(TREE, norm={"weight": TREE["norm"]["weight"].at[3].add(0.5)})
    path = save_view(tmp_path / "moved.safetensors", CONFIG, moved)
    with pytest.raises(UserError, match=r"1 of 26 tensors differ: model\.norm\.weight"):
        load_checkpoint(base, view=open_view(path))
    swapped = TREE["embed_tokens"]["embedding"]
    swapped = swapped.at[jnp.array([4, 5])].set(swapped[jnp.array([5, 4])])
    path = save_view(
        tmp_path / "swapped.safetensors", CONFIG, dict(TREE, embed_tokens={"embedding": swapped})
    )
    with pytest.raises(UserError, match=r"1 of 26 tensors differ: model\.embed_tokens\.weight"):
        load_checkpoint(base, view=open_view(path))


def test_other_sizes_are_refused_before_weights_are_read(base, tmp_path, monkeypatch) -> None:
    other = tiny_config()
    path = save_view(tmp_path / "v.safetensors", other, random_params(other, 1))
    monkeypatch.setattr("orthrus_jax.checkpoint.reader._open_tensors", None)
    with pytest.raises(UserError, match="trained for another base"):
        load_checkpoint(base, view=open_view(path))


def test_files_that_are_no_view_are_refused(base, tmp_path) -> None:
    path = save_view(tmp_path / "v.safetensors", CONFIG, TREE, rank=2)
    data = path.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-9])
    (tmp_path / "text.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    for name in ("cut", "text"):
        with pytest.raises(UserError, match=f"{name}.safetensors is not a readable safetensors"):
            open_view(tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"--view .*missing\.safetensors does not exist"):
        open_view(tmp_path / "missing.safetensors")
    with pytest.raises(UserError, match=r"view\.safetensors does not exist"):
        open_view(base)
    with pytest.raises(UserError, match=r"is not a view .*: a base is a --model"):
        open_view(base / "model.safetensors")
    about = open_file(path)
    for change, message in (
        ({"rank": 3}, "tensors are missing, unexpected, or of wrong shape"),
        ({"block_size": 1}, "block_size=1"),
        ({"rank": "2"}, "its description of the view is damaged: rank"),
        ({"mask_token_id": 10**6}, "mask_token_id=1000000"),
    ):
        save_file(
            load_file(path),
            tmp_path / "x.safetensors",
            {"orthrus_view": json.dumps(about | change)},
        )
        with pytest.raises(UserError, match=message):
            load_checkpoint(base, view=open_view(tmp_path / "x.safetensors"))
    del about["base"]
    save_file(load_file(path), tmp_path / "x.safetensors", {"orthrus_view": json.dumps(about)})
    with pytest.raises(UserError, match="its description of the view is damaged: base"):
        open_view(tmp_path / "x.safetensors")


def open_file(path: pathlib.Path) -> dict:
    with safe_open(path, framework="np") as file:
        return json.loads(file.metadata()["orthrus_view"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0: expected a whole number from 1"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"dtype": "int4"}, "dtype='int4' is not one of"),
    ],
)
def test_bad_options_of_a_view_are_refused(tmp_path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        save_view(tmp_path / "v.safetensors", CONFIG, TREE, **options)
    assert list(tmp_path.iterdir()) == []


def test_taken_file_is_kept_unless_overwritten(tmp_path) -> None:
    path = save_view(tmp_path / "v.safetensors", CONFIG, TREE)
    before = path.read_bytes()
    with pytest.raises(UserError, match="is there: name another file"):
        save_view(path, CONFIG, TREE, rank=1)
    assert path.read_bytes() == before
    assert save_view(path, CONFIG, TREE, overwrite=True).read_bytes() == before  # the same bytes


def test_flags_of_convert_that_do_not_fit_are_refused(base, tmp_path) -> None:
    for flags, message in (
        (["--to", "out", "--rank", "4"], "--rank 4 needs --to FILE.safetensors"),
        (["--to", "v.safetensors", "--rank", "0"], "--rank 0 must be at least 1"),
        (["--to", "out", "--view", "v", "--mask-token", "x"], "--mask-token x beside --view"),
    ):
        with pytest.raises(UserError, match=message):
            main(["--from", str(base), *flags], progress=False)
