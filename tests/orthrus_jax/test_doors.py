"""What the doors for GGUF files, views and families refuse: a process each, its status and line."""

import json
import pathlib

import numpy as np
import pytest

from orthrus_jax.checkpoint import config_to_hf, save_checkpoint, save_view
from orthrus_jax.model import params as params_lib
from tests.support.commands import CommandLine, check_refused
from tests.support.configs import FAMILIES, tiny_config
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

pytest.importorskip("gguf")
from tests.support.gguf_files import hf_tensors, write_gguf

CONVERT = "orthrus_jax.convert --to out --from"
GENERATE = "orthrus_jax.generate --prompt hi --max-new-tokens 4 --compile-cache off --model"
LINES = [
    # GGUF
    CommandLine(f"{CONVERT} {{missing}}.gguf", "missing.gguf is not a readable GGUF file (No such"),
    CommandLine(f"{CONVERT} {{folder}}.gguf", "folder.gguf is not a readable GGUF file ("),
    CommandLine(f"{CONVERT} {{empty}}", "it begins with b''"),
    CommandLine(f"{CONVERT} {{pointer}}", "it begins with b'vers', not with b'GGUF'"),
    CommandLine(f"{CONVERT} {{header}}", "cut off: it ends at byte 100 within its header"),
    CommandLine(f"{CONVERT} {{cut}}", "cut off: "),
    CommandLine(f"{CONVERT} {{old}}", "version 1: 2 and 3 are read"),
    CommandLine(f"{CONVERT} {{experts}}", "not supported: llama.expert_count=8"),
    CommandLine(f"{CONVERT} {{foreign}}", "general.architecture='gemma2' is not one of llama"),
    CommandLine(f"{CONVERT} {{split}}", "tokenizer.ggml.pre='falcon' is not one of gpt-2"),
    CommandLine(f"{CONVERT} {{good}} --mask-token nothing", "--mask-token 'nothing' is no token"),
    CommandLine(f"{CONVERT} {{good}} --view {{view}}", "convert {good} first, then add the view"),
    # views
    CommandLine(f"{GENERATE} {{base}} --view {{missing}}.safetensors", "does not exist"),
    CommandLine(f"{GENERATE} {{base}} --view {{base}}", "view.safetensors does not exist"),
    CommandLine(f"{GENERATE} {{base}} --view {{base}}/model.safetensors", "is not a view that"),
    CommandLine(f"{GENERATE} {{base}} --view {{torn}}", "is not a readable safetensors file"),
    CommandLine(
        f"{GENERATE} {{base}} --view {{foreign_view}}", "another base: vocab_size=300 (the"
    ),
    CommandLine(f"{GENERATE} {{base}} --view {{other_view}}", "tensors differ: model."),
    CommandLine(f"{CONVERT} {{base}} --rank 8", "--rank 8 needs --to FILE.safetensors"),
    CommandLine(
        f"{CONVERT} {{base}} --view {{view}} --mask-token x", "--mask-token x beside --view"
    ),
    # families
    CommandLine(f"{GENERATE} {{mistral}}", "not supported: sliding_window=4096"),
    CommandLine(f"{GENERATE} {{yarn}}", "not supported: rope_scaling={{'rope_type': 'yarn'"),
    CommandLine(f"{GENERATE} {{moe}}", "not supported: model_type='mixtral'; architectures="),
    CommandLine(f"{GENERATE} {{biased}}", "not supported: attention_bias=True; mlp_bias=True"),
    CommandLine(f"{CONVERT} {{unmasked}}", "name a token that the model's answers hardly use"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Good and bad files by the names of LINES; an absent name is a path where nothing is."""
    folder = tmp_path_factory.mktemp("doors")
    place: dict[str, pathlib.Path] = {"missing": folder / "missing", "folder": folder / "folder"}
    (folder / "folder.gguf").mkdir()
    bases(folder, place)
    files(folder, place)
    return place


def bases(folder: pathlib.Path, place: dict[str, pathlib.Path]) -> None:
    tokenizer = small_tokenizer(["a few words of text"], 290)
    rows = len(tokenizer)
    config = tiny_config(**FAMILIES["llama"], vocab_size=300, mask_token_id=299)
    tree = random_params(config, 1)
    place["base"] = folder / "base"
    save_checkpoint(place["base"], config, params_lib.split(tree)[0], tokenizer=tokenizer)
    for name, of, weights in (
        ("view", config, tree),
        ("other_view", config, random_params(config, 2)),
        ("foreign_view", tiny_config(), random_params(tiny_config(), 1)),
    ):
        place[name] = save_view(folder / f"{name}.safetensors", of, weights)
    place["torn"] = folder / "torn.safetensors"
    place["torn"].write_bytes(place["view"].read_bytes()[:-5])
    raw = config_to_hf(config, orthrus=False)
    settings = {
        "mistral": {"model_type": "mistral", "architectures": ["MistralForCausalLM"],
                    "sliding_window": 4096},
        "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "rope_parameters": None},
        "moe": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
        "biased": {"attention_bias": True, "mlp_bias": True},
    }  # fmt: skip
    for name, change in settings.items():
        place[name] = folder / name
        place[name].mkdir()
        (place[name] / "config.json").write_text(json.dumps(raw | change))
    full = tiny_config(**FAMILIES["llama"], vocab_size=rows, mask_token_id=None)
    place["unmasked"] = folder / "unmasked"
    frozen = params_lib.split(random_params(full, 1))[0]
    save_checkpoint(place["unmasked"], full, frozen, tokenizer=tokenizer)


def files(folder: pathlib.Path, place: dict[str, pathlib.Path]) -> None:
    config = tiny_config(**FAMILIES["llama"], vocab_size=260)
    tensors = hf_tensors(config)

    def write(name: str, **options: object) -> bytes:
        place[name] = folder / f"{name}.gguf"
        return write_gguf(place[name], config, tensors, **options).read_bytes()  # type: ignore[arg-type]

    whole = write("good")
    write("experts", settings={"expert_count": 8})
    write("split", tokenizer={"model": "gpt2", "pre": "falcon", "tokens": ["a"], "merges": []})
    damaged = {
        "empty": b"",
        "pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "header": whole[:100],
        "cut": whole[:-1],
        "old": whole[:4] + np.uint32(1).tobytes() + whole[8:],
        "foreign": whole.replace(b"\5\0\0\0\0\0\0\0llama", b"\6\0\0\0\0\0\0\0gemma2", 1),
    }
    for name, data in damaged.items():
        place[name] = folder / f"{name}.gguf"
        place[name].write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("line", LINES, ids=str)
def test_bad_input_of_a_door_is_refused_in_one_line(line: CommandLine, places, tmp_path) -> None:
    check_refused(line, tmp_path, places)


def test_doors_refuse_24_kinds_of_input() -> None:
    assert len({str(line) for line in LINES}) >= 24
