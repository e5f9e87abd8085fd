"""The speed bench: its refusals, and transformers decoding the very same model."""

import importlib.util
import json
import types

import numpy as np
import pytest

from eval import speed
from eval.hf import HF
from orthrus_jax import memory
from orthrus_jax.checkpoint import save_checkpoint
from orthrus_jax.decoding import Strategy
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from tests.support.configs import tiny_config
from tests.support.tokenizers import small_tokenizer
from tests.support.weights import random_params

TEXTS = ["How many apples are 12 and 30?", "They are 42 apples. The answer is \\boxed{42}."] * 20
SIZES = {"vocab_size": 400, "mask_token_id": 399, "num_hidden_layers": 1, "eos_token_ids": (2, 7)}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = tiny_config(**SIZES)
    path = tmp_path_factory.mktemp("model") / "tiny"
    weights = random_params(config, 3, gain=3.0)
    save_checkpoint(path, config, weights, tokenizer=small_tokenizer(TEXTS, 400))
    return str(path)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ["How many?", "What are 12 and 30 apples? The answer is boxed."]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def one_thread():
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two thread pools on two cores spin against each other
    yield torch
    torch.set_num_threads(before)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_and_our_ar_loop_give_the_same_text(tied, one_thread) -> None:
    """Other lengths side by side, with and without an end token on the way."""
    config = tiny_config(**SIZES, tie_word_embeddings=tied)
    weights = random_params(config, 3, gain=3.0)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(8, 398, n).tolist() for n in (1, 3, 9, 14, 20, 6, 2)]
    ours = LLM(config, weights)
    expected = [c.tokens for c in ours.complete(prompts, strategy="ar", max_new_tokens=40)]
    ends = [answer[-1] for answer in expected]
    if not {2, 7} & set(ends):  # make one of the answers end early: at a token that it has
        config = tiny_config(
            **{**SIZES, "eos_token_ids": (2, expected[0][5])}, tie_word_embeddings=tied
        )
        ours = LLM(config, weights)
        expected = [c.tokens for c in ours.complete(prompts, strategy="ar", max_new_tokens=40)]
    assert len({len(answer) for answer in expected}) > 1
    theirs = HF(config, weights)
    for batch_size in (1, 3):
        assert theirs.complete(prompts, max_new_tokens=40, batch_size=batch_size) == expected


def test_bfloat16_weights_reach_torch_bit_by_bit(one_thread) -> None:
    import jax
    import jax.numpy as jnp

    config = tiny_config(**SIZES, dtype="bfloat16")
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(config, 3))
    torch_model = HF(config, weights).model
    assert {p.dtype for p in torch_model.parameters()} == {one_thread.bfloat16}
    weight = np.asarray(weights["layers_0"]["mlp"]["up_proj"]["weight"])
    theirs = torch_model.model.layers[0].mlp.up_proj.weight.detach().view(one_thread.int16).numpy()
    np.testing.assert_array_equal(theirs, weight.view(np.int16))


def test_all_modes_are_timed_in_one_run(directory, prompts, tmp_path, capsys, one_thread) -> None:
    out = tmp_path / "out.json"
    arguments = ["--model", directory, "--prompts", prompts, "--modes", ",".join(speed.MODES)]
    arguments += ["--contexts", "32", "--max-new-tokens", "12", "--repeats", "2"]
    arguments += ["--plot", str(tmp_path / "out.png"), "--json", str(out)]
    speed.main(arguments)
    result, output = json.loads(out.read_text()), capsys.readouterr().out
    (text,) = result["text"]
    for name in speed.MODES:
        assert text[name]["same_text"] == 1.0
        assert text[name]["tokens_per_second"] > 0
        assert f"| 1 | {name} | " in output
    (forward,) = result["forwards"]
    assert forward["hf_step_ms"] > 0
    assert "hf: transformers " in output
    assert "| hf step ms |" in output
    assert (tmp_path / "out.png").stat().st_size > 1000


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)

    def call(self, *seconds, returning=None):
        """A function whose calls take these seconds in turn."""
        left = list(seconds)

        def timed(*_):
            self.now += left.pop(0)
            return returning

        return timed


def test_transformers_steps_are_timed_without_their_context(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    run = clock.call(900.0, 0.16, 0.80, 0.32)  # the first is a warm-up

    def steps(batch, context, count):
        assert (batch, context, count) == (2, 64, 16)
        clock.now += 50.0  # reading the context
        return run

    times = speed.time_hf(types.SimpleNamespace(steps=steps), 2, 64, 3)
    assert times["hf_step_ms"] == pytest.approx(20.0)
    assert times["hf_step_ms_range"] == pytest.approx([10.0, 50.0])


def test_texts_are_timed_in_turn_and_compared_with_the_first(monkeypatch) -> None:
    clock = Clock(monkeypatch)
    variants = {
        "ar": clock.call(99.0, 10.0, 20.0, 40.0, returning=[[1, 2], [3, 4]]),
        "orthrus": clock.call(99.0, 5.0, 4.0, 10.0, returning=[[1, 2], [3, 5]]),
    }
    timed = speed.time_text([[7], [8]], 3, variants)
    ar, orthrus = timed["ar"], timed["orthrus"]
    assert timed["prompts"] == 2
    assert ar["tokens_per_second"] == pytest.approx(0.2)
    assert ar["range"] == pytest.approx([0.1, 0.4])
    assert (ar["speedup"], ar["same_text"]) == (1.0, 1.0)
    assert orthrus["tokens_per_second"] == pytest.approx(0.8)
    assert orthrus["range"] == pytest.approx([0.4, 1.0])
    assert orthrus["speedup"] == pytest.approx(4.0)  # of the pairs 2, 5 and 4
    assert orthrus["same_text"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--contexts", "64,99999"), r"--contexts 99999: the model has \d+ positions"),
        (("--draft-length", "99"), "draft_length=99 must be from 2 to 4"),
        (("--max-new-tokens", "99999"), r"with max_new_tokens=99999 that is over the model's"),
        (
            ("--batch-sizes", "1,100000000"),
            r"--batch-sizes 100000000 with --contexts 128 needs about .* GB .*: lower one of them",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_timed(
    directory, prompts, monkeypatch, options, message
) -> None:
    monkeypatch.setattr(speed, "copy_bandwidth", None)
    with pytest.raises(UserError, match=message):
        speed.main(["--model", directory, "--prompts", prompts, "--contexts", "128", *options])


def test_preset_larger_than_the_memory_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda devices: 24 * 10**9)
    message = (
        r"^--random-weights qwen3-32b needs about [67]\d(\.\d)? GB of memory, 24 GB are free: "
    )
    with pytest.raises(UserError, match=message):
        speed.main(["--random-weights", "qwen3-32b"])


def test_single_point_is_drawn_on_plain_axes(tmp_path, axes) -> None:
    forward = {"batch": 1, "context": 128, "ar_step_ms": 1.0, "cycle_ms": 1.7}
    rate = {"tokens_per_second": 100.0}
    text = {"batch": 1, "prompts": 3, "ar": rate, "orthrus": rate}
    speed.draw(tmp_path / "one.png", {"forwards": [forward], "text": [text]})
    for axis in axes:
        assert axis.get_xscale() == axis.get_yscale() == "linear"
        assert axis.get_ylim()[0] == 0
    longer = forward | {"context": 4096, "cycle_ms": 20.0}
    speed.draw(tmp_path / "two.png", {"forwards": [forward, longer], "text": []})
    assert axes[-1].get_xscale() == axes[-1].get_yscale() == "log"
    assert [label.get_text() for label in axes[-1].get_xticklabels()] == ["128", "4096"]


def test_report_without_hf_has_no_column_for_it(directory, capsys) -> None:
    speed.main(["--model", directory, "--contexts", "32", "--repeats", "1"])
    output = capsys.readouterr().out
    assert "hf" not in output
    header, ruler, row = output.splitlines()[2:5]
    assert header.count("|") == ruler.count("|") == row.count("|")


def test_missing_torch_is_reported_before_anything_is_loaded(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "torch" else find(name, *more),
    )
    with pytest.raises(UserError, match=r"^--modes hf needs torch: pip install torch[^\n]*$"):
        speed.main(["--model", "no/such/model", "--modes", "ar,hf"])


def test_unknown_modes_and_prompts_without_weights_are_refused(prompts) -> None:
    with pytest.raises(
        UserError,
        match="--modes names beam: expected some of ar, orthrus, two-forward, one-forward, hf",
    ):
        speed.main(["--model", "absent", "--modes", "ar,beam"])
    with pytest.raises(UserError, match="--prompts needs --model"):
        speed.main(["--random-weights", "qwen3-4b", "--prompts", prompts])


def test_row_counts_without_a_mode_that_spends_them_are_refused() -> None:
    for options, message in {
        ("--tree-nodes", "6"): "--tree-nodes 6 needs two-forward or one-forward among --modes",
        ("--modes", "ar,hf", "--tree-nodes", "6"): "--tree-nodes 6 needs two-forward or one-",
        ("--modes", "two-forward", "--fresh-blocks", "1"): "--fresh-blocks 1 needs one-forward a",
    }.items():
        with pytest.raises(UserError) as error:
            speed.main(["--model", "absent", *options])
        assert str(error.value).startswith(message)


def test_row_counts_reach_the_modes_that_spend_them() -> None:
    arguments = ["--model", "absent", "--draft-length", "3", "--tree-nodes", "6"]
    args = speed._parser().parse_args([*arguments, "--fresh-blocks", "1"])
    assert {mode: speed.strategy_of_mode(mode, args) for mode in speed.METHODS} == {
        "ar": Strategy("ar"),
        "orthrus": Strategy("orthrus", 3),
        "two-forward": Strategy("orthrus-2f", 3, 6),
        "one-forward": Strategy("orthrus-1f", 3, 6, fresh_blocks=1),
    }
