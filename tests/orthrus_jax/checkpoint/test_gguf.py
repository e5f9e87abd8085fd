"""GGUF in: the model, its tokenizer and its logits as transformers reads them; damage refused."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax.checkpoint import (
    gguf_config,
    gguf_tokenizer,
    load_checkpoint,
    load_gguf,
    open_gguf,
    save_checkpoint,
)
from orthrus_jax.checkpoint.gguf_file import KINDS
from orthrus_jax.config import Llama3Rope
from orthrus_jax.convert import main
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, ar_segment
from orthrus_jax.model import params as params_lib
from tests.support.compare import flat, relative_error, same_bits
from tests.support.configs import FAMILIES, tiny_config
from tests.support.paths import DATA

gguf = pytest.importorskip("gguf")
from tests.support.gguf_files import (  # noqa: E402
    hf_tensors,
    rope_factors,
    write_gguf,
)

TEXTS = (
    "Hello world, it's 12345 and  12 tabs\t\n\n  x = 3;\n",
    "ÜNÏCÖDÉ ☃ 日本語 don't I'LL __init__   end",
    "  two spaces first, e\u0301 decomposed, 007\r\n\r\nlast",
)


def config_of(family: str, **changes):
    """A model whose rows are whole K-quant blocks; its vocabulary is that of write_gguf."""
    sizes = {
        "vocab_size": 260,
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mask_token_id": None,
        "eos_token_ids": (257,),
        "tie_word_embeddings": family != "qwen2",
        "max_position_embeddings": 512,
        "block_size": 32,
    }
    return tiny_config(**sizes | FAMILIES[family] | changes)


def logits(config, params, tokens: np.ndarray) -> np.ndarray:
    model = Model(config)
    rows = ar_segment(jnp.asarray(tokens), jnp.zeros(len(tokens), jnp.int32))
    (hidden,), _ = model.forward(params, [rows], None)
    return np.asarray(model.logits(params, hidden))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_kind_of_tensor_gives_the_logits_of_transformers(tmp_path, family: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM

    wide = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}
    config = config_of(family, **(wide if family == "qwen3" else {}))  # transformers takes no other
    path = write_gguf(tmp_path / "model.gguf", config, hf_tensors(config), tuple(KINDS))
    assert {tensor.kind for tensor in open_gguf(path).tensors.values()} == set(KINDS)
    ours = load_gguf(open_gguf(path))
    assert ours.config == config
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(0, 260, (2, 40))
    with torch.no_grad():
        reference = theirs.eval()(torch.tensor(tokens)).logits.numpy()
    assert np.abs(reference).max() > 0.1
    assert relative_error(logits(ours.config, ours.params, tokens), reference) < 2e-5


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3"])
def test_plain_tensors_come_back_bit_by_bit_in_hugging_faces_order(tmp_path, family: str) -> None:
    config, extra = config_of(family), {}
    if family == "llama3":
        released = Llama3Rope(32.0, 1.0, 4.0, 8192)
        config = dataclasses.replace(config, rope_theta=500_000.0, rope_scaling=released)
        extra = {"rope_freqs.weight": rope_factors(config)}
    tensors = hf_tensors(config)
    loaded = load_gguf(open_gguf(write_gguf(tmp_path / "m.gguf", config, tensors, extra=extra)))
    model_type = "llama" if family == "mistral" else config.model_type
    assert loaded.config == dataclasses.replace(config, model_type=model_type)
    assert not loaded.trained
    save_checkpoint(tmp_path / "out", loaded.config, params_lib.split(loaded.params)[0])
    from safetensors.numpy import load_file

    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(same_bits(written[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(("kind", "dtype"), [(1, "float16"), (30, "bfloat16"), (2, "float32")])
def test_dtype_is_that_of_the_matrices_or_float32(tmp_path, kind: int, dtype: str) -> None:
    config = config_of("llama")
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), (kind,))
    assert load_gguf(open_gguf(path)).config.dtype == dtype
    assert load_gguf(open_gguf(path), dtype="bfloat16").config.dtype == "bfloat16"


def test_convert_writes_a_checkpoint_with_tokenizer_template_and_mask(tmp_path, capsys) -> None:
    config = config_of("llama")
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), (8, 3))
    main(["--from", str(path), "--to", str(tmp_path / "out")], progress=False)
    assert "untrained" in capsys.readouterr().out
    loaded, direct = load_checkpoint(tmp_path / "out"), load_gguf(open_gguf(path))
    assert loaded.config == dataclasses.replace(direct.config, mask_token_id=258)  # <|spare|>
    for name, leaf in flat(direct.params).items():
        assert same_bits(flat(loaded.params)[name], leaf), name
    from orthrus_jax.tokenizer import encode_messages, load_tokenizer

    tokenizer = load_tokenizer(tmp_path / "out")
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == gguf_tokenizer(open_gguf(path))(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert encode_messages(tokenizer, [{"role": "user", "content": "ab"}]) == [259]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")


def ggml_of(tokenizer, pre: str) -> dict:
    """A byte-level tokenizer's metadata, as llama.cpp's converter writes it."""
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    vocabulary = tokenizer.get_vocab()
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    added = set(tokenizer.added_tokens_decoder) - special
    ids = range(len(vocabulary))
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": sorted(vocabulary, key=vocabulary.get),
        "token_type": [3 if i in special else 4 if i in added else 1 for i in ids],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "eos_token_id": tokenizer.eos_token_id,
    }


@pytest.mark.skipif(not (DATA / "qwen3_tokenizer").is_dir(), reason="the shared data is not here")
def test_tokenizer_of_qwen3_survives_a_gguf(tmp_path) -> None:
    from orthrus_jax.tokenizer import load_tokenizer

    real, config = load_tokenizer(DATA / "qwen3_tokenizer"), config_of("qwen3")
    path = write_gguf(
        tmp_path / "m.gguf", config, hf_tensors(config), tokenizer=ggml_of(real, "qwen2"),
        template=real.chat_template,
    )  # fmt: skip
    ours = gguf_tokenizer(open_gguf(path))
    readme = (pathlib.Path(__file__).parents[3] / "README.md").read_text()
    for text in (*TEXTS, readme, "<|im_start|>user\n<think>\n\n</think>x<|im_end|>"):
        assert ours(text)["input_ids"] == real(text)["input_ids"]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Hi 42"}]
    shown = [t.apply_chat_template(messages, add_generation_prompt=True) for t in (ours, real)]
    assert list(shown[0]["input_ids"]) == list(shown[1]["input_ids"])


SENTENCEPIECE = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)),
               "▁", "a", "b", "▁a", "ab", "▁ab", "c", "bc", "▁abc"],
    "scores": [0.0] * 259 + [-9.0, -10.0, -11.0, -1.0, -2.0, -3.0, -12.0, -4.0, -5.0],
    "token_type": [2, 3, 3, *[6] * 256, *[1] * 9],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "sentencepiece"])
def test_tokenizer_splits_as_transformers_reads_it(tmp_path, pre: str) -> None:
    pytest.importorskip("torch")  # transformers asks for it
    from transformers import AutoTokenizer

    from tests.support.tokenizers import small_tokenizer

    config = config_of("llama")
    ggml = SENTENCEPIECE if pre == "sentencepiece" else None
    if ggml is None:
        ggml = ggml_of(small_tokenizer([*TEXTS, "and 12 it's don't 345"] * 3, 400), pre)
        ggml |= {"add_bos_token": False}
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), tokenizer=ggml)
    ours = gguf_tokenizer(open_gguf(path))
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    texts = ("abc ab", "a  b c", "cab é") if pre == "sentencepiece" else TEXTS[:2]
    for text in texts:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text


def test_smollm_splits_each_digit_before_words(tmp_path) -> None:
    config = config_of("llama")
    plain = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config))
    file = open_gguf(plain)
    ggml = {f"tokenizer.ggml.{k}": v for k, v in {"pre": "smollm"}.items()}
    ours = gguf_tokenizer(file._replace(metadata=file.metadata | ggml))
    pieces = ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's  12 x")
    assert [piece for piece, _ in pieces] == ["it", "'s", "ĠĠ", "1", "2", "Ġx"]


CUT = (0, 3, 4, 12, 23, 24, 40, 200, 2_000, 10_000)


@pytest.mark.parametrize("size", CUT)
def test_file_that_is_cut_off_is_refused_in_one_line(tmp_path, size: int) -> None:
    config = config_of("llama", vocab_size=260)
    whole = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config)).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:size])
    with pytest.raises(UserError, match="not a readable GGUF file") as error:
        open_gguf(tmp_path / "cut.gguf")
    assert "\n" not in str(error.value)
    (tmp_path / "cut.gguf").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"cut off: blk\.\d\.\S+|cut off: \S+ ends at byte"):
        open_gguf(tmp_path / "cut.gguf")


def test_damaged_bytes_are_refused_or_harmless_never_a_traceback(tmp_path) -> None:
    config = config_of("llama", num_hidden_layers=1)
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config))
    whole, refusals = bytearray(path.read_bytes()), []
    header = min(tensor.start for tensor in open_gguf(path).tensors.values())
    rng = np.random.default_rng(0)
    for _ in range(400):
        damaged = bytearray(whole)
        for at in rng.integers(0, header, rng.integers(1, 4)):
            damaged[at] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            file = open_gguf(path)
            gguf_config(file)
            gguf_tokenizer(file)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)


REFUSED = {
    "experts": ({"expert_count": 8}, "llama.expert_count=8"),
    "window": ({"attention.sliding_window": 4096}, "llama.attention.sliding_window=4096"),
    "scaling": ({"rope.scaling.type": "yarn"}, "llama.rope.scaling.type='yarn'"),
    "unknown": ({"attention.logit_softcapping": 30.0}, "llama.attention.logit_softcapping=30.0"),
    "value heads": ({"attention.value_length": 32}, "llama.attention.value_length=32"),
    "partial rotation": ({"rope.dimension_count": 32}, "llama.rope.dimension_count=32"),
    "missing": ({"feed_forward_length": None}, "lacks intermediate_size"),
    "per layer": ({"attention.head_count_kv": [2, 1]}, "num_key_value_heads=[2, 1]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_setting_that_is_not_computed_is_refused_by_name(tmp_path, name: str) -> None:
    settings, message = REFUSED[name]
    config = config_of("llama")
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), settings=settings)
    with pytest.raises(UserError) as error:
        load_gguf(open_gguf(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_settings_without_effect_are_not_refused(tmp_path) -> None:
    config = config_of("llama")
    none = {"rope.scaling.type": "none", "expert_count": 0}
    path = write_gguf(tmp_path / "m.gguf", config, hf_tensors(config), settings=none)
    assert gguf_config(open_gguf(path)) == config


def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path) -> None:
    config, tensors = config_of("llama"), hf_tensors(config_of("llama"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    extra = {"blk.0.attn_q.bias": np.zeros(256, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", config, tensors, extra=extra)
    with pytest.raises(UserError, match=r"1 missing: model\.layers\.1\.mlp.*q_proj\.bias"):
        load_gguf(open_gguf(path))
    odd = {"rope_freqs.weight": np.linspace(1, 5, 32, dtype=np.float32)}
    path = write_gguf(tmp_path / "n.gguf", config, hf_tensors(config), extra=odd)
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        load_gguf(open_gguf(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert' is not one of gpt2, llama"),
        ({"pre": "falcon"}, "tokenizer.ggml.pre='falcon' is not one of gpt-2, smollm"),
        ({"tokens": ["a", "a"]}, "tokenizer.ggml.tokens holds a token twice"),
        ({"merges": ["a zz"]}, "the tokenizer is damaged or incomplete"),
        ({"eos_token_id": 10**6}, "the tokenizer is damaged or incomplete"),
    ],
)
def test_tokenizer_that_is_not_read_is_refused(tmp_path, changes: dict, message: str) -> None:
    config = config_of("llama")
    file = open_gguf(write_gguf(tmp_path / "m.gguf", config, hf_tensors(config)))
    ggml = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(UserError) as error:
        gguf_tokenizer(file._replace(metadata=file.metadata | ggml))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
