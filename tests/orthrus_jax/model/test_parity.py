"""The AR view against transformers, family by family and part by part, in float32 on the CPU.

Each family sets the switches of ModelConfig in its own way. Weights are random and far from their
initial scale, so that no comparison is of zeros. Every bound is on max |ours - theirs| / max
|theirs|.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthrus_jax import attention, decoding
from orthrus_jax.attention.cache import LayerCache
from orthrus_jax.attention.rotary import apply_rope, rope_cos_sin
from orthrus_jax.checkpoint import config_to_hf, tensor_specs
from orthrus_jax.config import Llama3Rope, ModelConfig
from orthrus_jax.model import Layer, Model, ar_segment, block_segment
from orthrus_jax.model import params as params_lib
from orthrus_jax.model.layers import AttentionProjections, RMSNorm, SwiGLU
from tests.support.compare import flat, relative_error
from tests.support.configs import FAMILIES, NO_EOS, tiny_config
from tests.support.decoding import orthrus_decode
from tests.support.marks import slow
from tests.support.weights import random_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

torch.set_num_threads(1)  # two thread pools on two cores spin against each other
BOUND = 2e-5
T = 13
CONFIGS = {
    "gqa1-tied": tiny_config(num_key_value_heads=4, head_dim=8),
    "gqa2-wide-heads-untied": tiny_config(
        hidden_size=48, head_dim=32, tie_word_embeddings=False, rms_norm_eps=1e-5
    ),
    "gqa5-tied": tiny_config(
        hidden_size=40, num_attention_heads=5, num_key_value_heads=1, head_dim=24, vocab_size=101
    ),
    "gqa5-two-groups-untied": tiny_config(
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=3,
        num_attention_heads=10,
        num_key_value_heads=2,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
    ),
    **{f"{name}-gqa2-tied": tiny_config(**FAMILIES[name]) for name in FAMILIES},
    "llama3-released-shape": tiny_config(  # of a released config.json's rotary settings
        **FAMILIES["llama"] | {"rope_theta": 5e5, "rope_scaling": Llama3Rope(32.0, 1.0, 4.0, 8192)},
        head_dim=64,
        tie_word_embeddings=False,
    ),
    "qwen2-gqa3-wide-heads-untied": tiny_config(
        **FAMILIES["qwen2"],
        hidden_size=48,
        num_attention_heads=6,
        head_dim=32,
        vocab_size=331,
        tie_word_embeddings=False,
    ),
}
GAINS = (0.3, 1.0, 2.0)


class Pair:
    """One set of weights in both implementations, and inputs of unit scale."""

    def __init__(self, config: ModelConfig, gain: float) -> None:
        self.config, self.model = config, Model(config)
        self.params = random_params(config, 11, gain=gain)
        self.theirs = reference(config, self.params)
        rng = np.random.default_rng(5)
        self.x = rng.normal(size=(2, T, config.hidden_size)).astype(np.float32)
        self.tokens = rng.integers(0, config.vocab_size, (2, T))
        self.positions = np.array([np.arange(T), np.arange(T) + 900])
        self.angles = angles_of(config, jnp.asarray(self.positions))

    def layer(self, *path: str) -> dict:
        tree = self.params["layers_1"]
        for name in path:
            tree = tree[name]
        return {"params": tree}

    def torch_rotary(self) -> tuple:
        return self.theirs.model.rotary_emb(torch.tensor(self.x), torch.tensor(self.positions))


def angles_of(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    return rope_cos_sin(positions, config.head_dim, config.rope_theta, config.rope_scaling)


def reference(config: ModelConfig, params: dict):
    """transformers' model of our config.json, loaded with our weights by their names."""
    raw = config_to_hf(config, orthrus=False)
    theirs = transformers.AutoConfig.for_model(**raw, attn_implementation="eager")
    model = getattr(transformers, raw["architectures"][0])(theirs)
    model = model.to(torch.float32).eval()
    leaves, state = flat(params), {}
    for name, spec in tensor_specs(config, diffusion=False).items():
        value = np.asarray(leaves["/".join(spec.path)])
        state[name] = torch.tensor(value)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return model


@functools.cache
def pair_of(name: str, gain: float) -> Pair:
    return Pair(CONFIGS[name], gain)


PAIRS = [(n, g) for n in CONFIGS for g in GAINS if g == 1.0 or n.startswith("gqa")]


@pytest.fixture(params=PAIRS, ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request) -> Pair:
    return pair_of(*request.param)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def causal(mask_rows: int) -> "torch.Tensor":
    hidden = torch.full((mask_rows, mask_rows), float("-inf")).triu(1)
    return hidden[None, None]


def test_rms_norm(pair: Pair) -> None:
    module = RMSNorm(pair.config.rms_norm_eps)
    for scale in (1e-3, 1.0, 30.0):
        theirs = pair.theirs.model.layers[1].input_layernorm(torch.tensor(pair.x * scale))
        ours = module.apply(pair.layer("input_layernorm"), pair.x * np.float32(scale))
        assert relative_error(ours, theirs) < BOUND


def test_rotary_embedding(pair: Pair) -> None:
    q = np.random.default_rng(1).normal(size=(2, T, 6, pair.config.head_dim)).astype(np.float32)
    cos, sin = pair.torch_rotary()
    theirs, _ = apply_rotary_pos_emb(torch.tensor(q), torch.tensor(q), cos, sin, unsqueeze_dim=2)
    assert relative_error(apply_rope(jnp.asarray(q), *pair.angles), theirs) < BOUND


def test_projections_with_norms_and_rotation(pair: Pair) -> None:
    c, attn = pair.config, pair.theirs.model.layers[1].self_attn
    x = torch.tensor(pair.x)
    heads = (2, T, -1, c.head_dim)
    q, k = attn.q_proj(x).view(heads), attn.k_proj(x).view(heads)
    if c.qk_norm:
        q, k = attn.q_norm(q), attn.k_norm(k)
    q, k = apply_rotary_pos_emb(q, k, *pair.torch_rotary(), unsqueeze_dim=2)
    theirs = (q, k, attn.v_proj(x).view(heads))
    ours = AttentionProjections(c).apply(
        pair.layer("self_attn"), pair.x, *pair.angles, method="qkv"
    )
    for mine, other, count in zip(
        ours, theirs, (c.num_attention_heads, *[c.num_key_value_heads] * 2), strict=True
    ):
        assert mine.shape == (2, T, count, c.head_dim)
        assert relative_error(mine, other) < BOUND


def test_attention_module(pair: Pair) -> None:
    theirs, _ = pair.theirs.model.layers[1].self_attn(
        torch.tensor(pair.x), pair.torch_rotary(), causal(T)
    )
    module = AttentionProjections(pair.config)
    q, k, v = module.apply(pair.layer("self_attn"), pair.x, *pair.angles, method="qkv")
    end = jnp.broadcast_to(jnp.arange(T) + 1, (2, T))
    heads = attention.attend(q, LayerCache.from_rows(k, v), None, end)
    ours = module.apply(pair.layer("self_attn"), heads, method="out")
    assert relative_error(ours, theirs) < BOUND


def test_swiglu(pair: Pair) -> None:
    theirs = pair.theirs.model.layers[1].mlp(torch.tensor(pair.x))
    ours = SwiGLU(pair.config).apply(pair.layer("mlp"), pair.x)
    assert relative_error(ours, theirs) < BOUND


def test_decoder_layer(pair: Pair) -> None:
    positions = torch.arange(T)[None].expand(2, T)
    rotary = pair.theirs.model.rotary_emb(torch.tensor(pair.x), positions)
    theirs = pair.theirs.model.layers[1](
        torch.tensor(pair.x), attention_mask=causal(T), position_embeddings=rotary
    )
    segment = ar_segment(jnp.asarray(pair.tokens), jnp.zeros(2, jnp.int32))
    angles = angles_of(pair.config, segment.positions)
    (ours,), _ = Layer(pair.config).apply(
        pair.layer(), [jnp.asarray(pair.x)], [segment], [angles], None, False
    )
    assert relative_error(ours, theirs) < BOUND


def test_logits(pair: Pair) -> None:
    theirs = pair.theirs(torch.tensor(pair.tokens)).logits.numpy()
    segment = ar_segment(jnp.asarray(pair.tokens), jnp.zeros(2, jnp.int32))
    (hidden,), _ = pair.model.forward(pair.params, [segment], None)
    ours = pair.model.logits(pair.params, hidden)
    assert np.abs(theirs).max() > 1, "logits near 0 compare nothing"
    assert ours.dtype == jnp.float32
    assert relative_error(ours, theirs) < BOUND


@pytest.mark.parametrize("stacked", [False, True], ids=["layer by layer", "scanned"])
def test_taps_equal_hidden_states_of_transformers(pair: Pair, stacked: bool) -> None:
    """hidden_states[l + 1] is the residual stream after layer l, but for the last: normed."""
    theirs = pair.theirs(torch.tensor(pair.tokens), output_hidden_states=True).hidden_states
    layers = pair.config.num_hidden_layers
    taps = (layers - 1, *range(layers - 1))  # in any order
    segment = ar_segment(jnp.asarray(pair.tokens), jnp.zeros(2, jnp.int32))
    tree = params_lib.stack(pair.params) if stacked else pair.params
    (hidden,), _, tapped = pair.model.forward(tree, [segment], None, taps)
    for tap, ours in zip(taps[1:], tapped[1:], strict=True):
        assert relative_error(ours, theirs[tap + 1]) < BOUND
    norm = RMSNorm(pair.config.rms_norm_eps)
    last = norm.apply({"params": pair.params["norm"]}, tapped[0])
    assert relative_error(last, theirs[-1]) < BOUND
    assert relative_error(hidden, theirs[-1]) < BOUND


def test_taps_over_a_cache_are_those_of_ar_rows_alone(pair: Pair) -> None:
    theirs = pair.theirs(torch.tensor(pair.tokens), output_hidden_states=True).hidden_states
    tokens, zeros = jnp.asarray(pair.tokens), jnp.zeros(2, jnp.int32)
    first, rest = ar_segment(tokens[:, :9], zeros), ar_segment(tokens[:, 9:], zeros + 9)
    block = block_segment(tokens[:, 9], zeros + 9, 4, 3)
    cache = pair.model.init_cache(2, 24)
    _, cache, before = pair.model.forward(pair.params, [first], cache, (0,))
    hidden, _, after = pair.model.forward(pair.params, [block, rest], cache, (0,))
    assert len(hidden) == 2
    ours = jnp.concatenate([before[0], after[0]], axis=1)
    assert relative_error(ours, theirs[1]) < BOUND


def test_taps_that_cannot_be_read_are_refused(pair: Pair) -> None:
    tokens, zeros = jnp.asarray(pair.tokens), jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="layers"):
        pair.model.forward(pair.params, [ar_segment(tokens, zeros)], None, (99,))
    block = block_segment(tokens[:, 0], zeros, 4, 3)
    with pytest.raises(ValueError, match="AR segments"):
        pair.model.forward(pair.params, [block], pair.model.init_cache(2, 24), (0,))


def test_logits_of_unbatched_hidden_states_are_the_same(pair: Pair) -> None:
    hidden = jnp.asarray(pair.x)
    batched = pair.model.logits(pair.params, hidden)
    for one, other in ((hidden[0], batched[0]), (hidden[:, 3], batched[:, 3])):
        assert relative_error(pair.model.logits(pair.params, one), other) < BOUND


def test_names_of_every_tensor_are_transformers_own(pair: Pair) -> None:
    theirs = {name: tuple(t.shape) for name, t in pair.theirs.state_dict().items()}
    if pair.config.tie_word_embeddings:
        theirs.pop("lm_head.weight")
    ours = tensor_specs(pair.config, diffusion=False)
    assert {name: spec.shape for name, spec in ours.items()} == theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_padded_prefill_and_steps_over_a_cache_equal_one_forward(name: str) -> None:
    pair = pair_of(name, 1.0)
    model, params, tokens = pair.model, pair.params, jnp.asarray(pair.tokens)
    whole = ar_segment(tokens, jnp.zeros(2, jnp.int32))
    (hidden,), _ = model.forward(params, [whole], None)
    expected = np.asarray(model.logits(params, hidden))
    theirs = pair.theirs(torch.tensor(pair.tokens)).logits.numpy()

    lengths = np.array([5, 8])
    prompts = np.full((2, 10), 3)  # rows past a prompt's length are padding of no meaning
    for row, length in enumerate(lengths):
        prompts[row, :length] = pair.tokens[row, :length]
    prefill = ar_segment(jnp.asarray(prompts), jnp.zeros(2, jnp.int32), max_kv_len=10)
    (hidden,), cache = model.forward(params, [prefill], model.init_cache(2, 24))
    got = np.asarray(model.logits(params, hidden))
    for row, length in enumerate(lengths):
        assert relative_error(got[row, :length], expected[row, :length]) < BOUND

    step = jax.jit(lambda tokens, at, cache: model.forward(params, [ar_segment(tokens, at)], cache))
    for rows in (1, 1, 3):  # steps of one row, then of several, from each row's own length
        take = np.stack([pair.tokens[r, n : n + rows] for r, n in enumerate(lengths)])
        (hidden,), cache = step(jnp.asarray(take), jnp.asarray(lengths), cache)
        got = np.asarray(model.logits(params, hidden))
        for row, length in enumerate(lengths):
            at = slice(length, length + rows)
            assert relative_error(got[row], expected[row, at]) < BOUND
            assert relative_error(got[row], theirs[row, at]) < BOUND
        lengths = lengths + rows


TEXTS = {  # family, tied embeddings, prompts, new tokens
    "qwen3-tied": ("qwen3", True, 20, 200),
    "qwen3-untied": ("qwen3", False, 20, 200),
    **{f"{name}-short": (name, False, 3, 24) for name in FAMILIES if name != "qwen3"},
    **{name: (name, True, 20, 200) for name in FAMILIES if name != "qwen3"},
}


@pytest.mark.parametrize(
    "name", [*(n for n in TEXTS if "-" in n), *slow(*(n for n in TEXTS if "-" not in n))]
)
def test_greedy_text_is_token_identical_to_transformers_generate(name: str) -> None:
    """Prompts of as many lengths, EOS disabled, by both of our loops."""
    family, tied, rows, new = TEXTS[name]
    padded = 24
    config = tiny_config(
        vocab_size=211, mask_token_id=210, tie_word_embeddings=tied, **FAMILIES[family]
    )
    params, model = random_params(config, 2, gain=2.0), Model(config)
    rng = np.random.default_rng(4)
    lengths = rng.permutation(np.arange(3, 3 + rows))
    prompts = np.zeros((rows, padded), np.int32)
    left, mask = np.zeros((rows, padded), np.int64), np.zeros((rows, padded), np.int64)
    for row, length in enumerate(lengths):
        prompts[row, :length] = rng.integers(0, config.vocab_size, length)
        left[row, padded - length :], mask[row, padded - length :] = prompts[row, :length], 1

    theirs = (
        reference(config, params)
        .generate(
            torch.tensor(left),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )[:, padded:]
        .numpy()
    )
    assert theirs.shape == (rows, new)
    assert np.unique(theirs).size > (50 if rows == 20 else 10), (
        "a text of few tokens compares little"
    )

    for loop in (decoding.ar_decode, orthrus_decode):
        state = decoding.prefill(
            model,
            params,
            jnp.asarray(prompts),
            jnp.asarray(lengths, jnp.int32),
            jnp.full(rows, new, jnp.int32),
            NO_EOS,
            slots=256,
            max_new_tokens=new,
        )
        state = loop(model, params, state)
        np.testing.assert_array_equal(state.tokens, theirs)
