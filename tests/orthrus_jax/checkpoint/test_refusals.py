"""Checkpoints that cannot be loaded: one line names the file."""

import errno
import json
import pathlib
import shutil

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from orthrus_jax.checkpoint import load_checkpoint, resolve, save_checkpoint
from orthrus_jax.errors import UserError
from orthrus_jax.model import params as params_lib
from tests.support.configs import tiny_config
from tests.support.weights import random_params

CONFIG = tiny_config(eos_token_ids=(7, 9))
TREE = random_params(CONFIG, 1)
BASE, _ = params_lib.split(TREE)
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def single(tmp_path: pathlib.Path) -> pathlib.Path:
    """A sound Qwen3 in one file."""
    save_checkpoint(tmp_path / "single", CONFIG, BASE)
    return tmp_path / "single"


@pytest.fixture
def sharded(tmp_path: pathlib.Path) -> pathlib.Path:
    """A sound Qwen3 in several files."""
    save_checkpoint(tmp_path / "sharded", CONFIG, BASE, max_shard_bytes=20_000)
    return tmp_path / "sharded"


def refusal(source: str | pathlib.Path) -> str:
    """The message `load_checkpoint` refuses `source` with; it names it, in one line."""
    with pytest.raises(UserError) as raised:
        load_checkpoint(source)
    message = str(raised.value)
    assert str(source) in message
    assert "\n" not in message
    return message


def change(directory: pathlib.Path, **tensors: np.ndarray | None) -> None:
    """Replace tensors of a single-file checkpoint, named with _ for the dots; None removes one."""
    held = {name: value.copy() for name, value in load_file(directory / WEIGHTS).items()}
    for name, value in tensors.items():
        held.pop(name, None)
        if value is not None:
            held[name] = value
    save_file(held, directory / WEIGHTS)


def point(directory: pathlib.Path, old: str, new: str) -> None:
    """Rename a file in the index of a sharded checkpoint."""
    path = directory / INDEX
    path.write_text(path.read_text().replace(json.dumps(old), json.dumps(new)))


def first_shard(directory: pathlib.Path) -> pathlib.Path:
    return min(directory.glob("*.safetensors"))


# The tensors


def test_all_that_is_wrong_with_the_tensors_is_one_error(single: pathlib.Path) -> None:
    change(
        single,
        **{
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.7.mlp.up_proj.weight": np.zeros((48, 32), np.float32),
            "model.layers.0.self_attn.q_proj.weight": np.zeros((32, 64), np.float32),
            "model.layers.0.input_layernorm.weight": np.zeros(32, np.int32),
            "model.layers.1.input_layernorm.weight": np.zeros(31, np.float64),
        },
    )
    assert refusal(single) == (
        f"{single}: the tensors do not fit config.json; "
        "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "1 unexpected: model.layers.7.mlp.up_proj.weight; "
        "2 of wrong shape: "
        "model.layers.0.self_attn.q_proj.weight (is [32, 64], expected [64, 32]), "
        "model.layers.1.input_layernorm.weight (is [31], expected [32]); "
        "2 of wrong dtype: "
        "model.layers.0.input_layernorm.weight (is I32, expected F32, BF16 or F16), "
        "model.layers.1.input_layernorm.weight (is F64, expected F32, BF16 or F16)"
    )


def test_long_list_is_cut_and_counted(single: pathlib.Path) -> None:
    raw = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 4}))
    message = refusal(single)
    assert "22 missing: model.layers.2.input_layernorm.weight, " in message
    assert message.endswith(" and 16 more")
    assert message.count(".weight") == 6


@pytest.mark.parametrize("kind", ["architecture", "one_tensor"])
def test_orthrus_needs_its_whole_diffusion_view(single: pathlib.Path, kind: str) -> None:
    if kind == "architecture":
        raw = json.loads((single / "config.json").read_text())
        (single / "config.json").write_text(json.dumps(raw | {"architectures": ["OrthrusLM"]}))
        assert "12 missing: model.layers.0.self_attn.k_norm_diff.weight, " in refusal(single)
    else:
        change(single, **{"model.layers.0.self_attn.q_norm_diff.weight": np.ones(16, np.float32)})
        assert "11 missing: model.layers.0.self_attn.k_norm_diff.weight, " in refusal(single)


def test_head_of_tied_embeddings_must_be_their_copy(single: pathlib.Path) -> None:
    head = load_file(single / WEIGHTS)["model.embed_tokens.weight"].copy()
    change(single, **{"lm_head.weight": head})
    loaded = load_checkpoint(single)
    assert "lm_head" not in loaded.params
    head[63, 31] = np.nextafter(head[63, 31], np.float32(9))
    shorter, other, flat = head[:63].copy(), head.astype(np.float16), np.ones((), np.float32)
    for wrong in (head, shorter, other, flat):
        change(single, **{"lm_head.weight": wrong})
        assert refusal(single).endswith(
            "1 unexpected: lm_head.weight "
            "(tie_word_embeddings, but it differs from model.embed_tokens.weight)"
        )
    change(single, **{"model.embed_tokens.weight": None})
    assert "1 missing: model.embed_tokens.weight; 1 unexpected: lm_head.weight" in refusal(single)


def test_large_head_is_compared_to_its_last_row(tmp_path: pathlib.Path) -> None:
    config = tiny_config(vocab_size=4100)
    save_checkpoint(tmp_path / "q", config, params_lib.split(random_params(config, 1))[0])
    head = load_file(tmp_path / "q" / WEIGHTS)["model.embed_tokens.weight"].copy()
    change(tmp_path / "q", **{"lm_head.weight": head})
    load_checkpoint(tmp_path / "q")
    head[4099] += 1
    change(tmp_path / "q", **{"lm_head.weight": head})
    assert "lm_head.weight (tie_word_embeddings, but" in refusal(tmp_path / "q")


# The files


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"x" * 500,
        lambda data: data[:8] + b"\xff" * 50 + data[58:],
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    ids=["one_byte_short", "short", "empty", "noise", "bad_header", "lfs_pointer"],
)
def test_damaged_file_is_named(single: pathlib.Path, damage) -> None:
    path = single / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(single)
    assert f"{path} is not a readable safetensors file" in message
    assert "Git LFS pointer" in message


def test_missing_shard_is_named(sharded: pathlib.Path) -> None:
    shard = first_shard(sharded)
    shard.unlink()
    assert f"{shard} does not exist" in refusal(sharded)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "sub/x.safetensors", "..", "", "\\x.safetensors", "x\0y", "a" * 5000],
)
def test_index_may_not_name_a_path(sharded: pathlib.Path, name: str) -> None:
    shard = first_shard(sharded)
    (sharded / "sub").mkdir()
    for place in (sharded / "sub", sharded.parent):
        shutil.copy(shard, place / "x.safetensors")
    point(sharded, shard.name, name)
    assert "expected a name without a folder" in refusal(sharded)


def test_index_may_not_name_an_absolute_path(sharded: pathlib.Path) -> None:
    shard = first_shard(sharded)
    outside = sharded.parent / "x.safetensors"
    shutil.move(shard, outside)
    point(sharded, shard.name, str(outside))
    assert "expected a name without a folder" in refusal(sharded)


def test_link_out_of_the_directory_is_refused_and_one_within_is_read(
    sharded: pathlib.Path,
) -> None:
    shard = first_shard(sharded)
    (sharded / "store").mkdir()
    shutil.move(shard, sharded / "store" / "weights")
    shard.symlink_to("store/weights")
    load_checkpoint(sharded)
    shutil.move(sharded / "store", sharded.parent / "store")
    shard.unlink()
    shard.symlink_to("../store/weights")
    assert f"{shard} is a link to {sharded.parent / 'store' / 'weights'}" in refusal(sharded)


def test_loop_of_links_is_refused(sharded: pathlib.Path) -> None:
    shard = first_shard(sharded)
    shard.unlink()
    shard.symlink_to(shard.name)
    assert f"{shard} does not exist or is no file" in refusal(sharded)


def test_hub_snapshot_may_link_to_its_own_blobs_only(single: pathlib.Path) -> None:
    repo = single.parent / "hub" / "models--owner--name"
    snapshot, blobs = repo / "snapshots" / "abc", repo / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(single.iterdir()):
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    load_checkpoint(snapshot)
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(single / WEIGHTS)
    assert "outside its checkpoint" in refusal(snapshot)


def test_tensor_in_two_shards_is_refused(sharded: pathlib.Path) -> None:
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    shutil.copy(first, second)
    assert f"{second}: model." in refusal(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_index_without_a_map_is_named(sharded: pathlib.Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    assert f"{sharded / INDEX} has no weight_map" in refusal(sharded)


def test_pickle_is_not_read(single: pathlib.Path) -> None:
    (single / WEIGHTS).rename(single / "pytorch_model.bin")
    message = refusal(single)
    assert "is a pickle, which can run code, and is not read" in message
    assert "save_pretrained" in message


def test_directory_without_weights_or_config_is_named(single: pathlib.Path) -> None:
    (single / WEIGHTS).unlink()
    assert refusal(single) == f"{single} holds no {WEIGHTS} nor {INDEX}"
    (single / "config.json").unlink()
    assert f"{single / 'config.json'} does not exist" in refusal(single)


# The source


@pytest.mark.parametrize("source", ["nowhere", "./no/where", "a/b/c", "", "owner/"])
def test_source_that_is_neither_directory_nor_id_is_refused(
    tmp_path, monkeypatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path / "..")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # must not be asked
    if source == "":
        source = str(tmp_path / "missing")
    message = refusal(source)
    assert "no such directory" in message
    assert "give a checkpoint directory, or a hub id owner/name" in message


def test_file_is_not_a_source(single: pathlib.Path) -> None:
    assert "no such directory" in refusal(single / WEIGHTS)


def test_hub_id_is_fetched_without_pickles_and_code(single: pathlib.Path, monkeypatch) -> None:
    calls = []

    def fetch(repo: str, **options) -> str:
        calls.append((repo, options))
        return str(single)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve("owner/name", "v1") == single
    (repo, options), *more = calls
    assert (repo, options["revision"], more) == ("owner/name", "v1", [])
    names = "config.json model-1.safetensors merges.txt chat_template.jinja".split()  # noqa: SIM905
    refused = ["pytorch_model.bin", "modeling_orthrus.py", "original/model.safetensors", "a.pth"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        [*names, *refused],
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(chosen) == names
    assert load_checkpoint("owner/name").directory == single


@pytest.mark.parametrize("error", [OSError("offline\nsecond line"), ValueError(), KeyError("x")])
def test_failed_download_names_both_remedies(monkeypatch, error: Exception) -> None:
    def fetch(*args, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    message = refusal("owner/name")
    assert "give a checkpoint directory, or a hub id" in message
    assert "HF_TOKEN" in message
    assert (str(error) or "ValueError").splitlines()[0] in message


def test_revision_of_a_directory_is_refused(single: pathlib.Path) -> None:
    assert resolve(single) == single
    with pytest.raises(UserError, match="a revision \\(v1\\) needs a hub id"):
        resolve(single, "v1")


def test_weights_without_permission_are_not_called_damaged(single, monkeypatch) -> None:
    usual = pathlib.Path.open

    def denied(path: pathlib.Path, *arguments, **options):
        if path.name == WEIGHTS:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", denied)
    message = refusal(single)
    assert message.endswith(f"{WEIGHTS} cannot be read (Permission denied)")
    assert "damaged" not in message
