"""The audit passes an exact decoder and fails inexact ones: faults planted in rule and cache.

Every model here is tiny, and its diffusion view untrained: a copy of the AR attention, or random.
A fault is traced into programs of its own, because each model has its own config: they differ in
`max_position_embeddings`, which nothing computes with.
"""

import dataclasses
import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from eval import audit as audit_module
from eval import audit_law, lossless, reference
from eval.audit import Audit, Options
from eval.lossless import audit, table
from eval.reference import TokenStats, near_tie
from orthrus_jax.attention import cache
from orthrus_jax.checkpoint import read_config
from orthrus_jax.decoding import Acceptance, Strategy, sampling, speculative
from orthrus_jax.decoding.sampling import NoiseKey
from orthrus_jax.engine import Completion
from orthrus_jax.errors import UserError
from orthrus_jax.llm import LLM
from tests.support.configs import tiny_config
from tests.support.weights import random_params

EOS, K = 5, 4
NAMES = itertools.count(1000)
slow = pytest.mark.slow  # each of these compiles an audit of its own
PROMPTS = [
    row[:length].tolist()
    for row, length in zip(
        np.random.default_rng(0).integers(0, 63, (8, 12)), [1, 2, 3, 5, 7, 9, 11, 12], strict=True
    )
]
TOKENS = {"max_new_tokens": 48, "batch_size": 8}
# More texts than rows: rows are refilled.
SAMPLED = {**TOKENS, "batch_size": 32, "seeds": 6, "temperature": 2.0}


def tiny_model(*, view: str = "copy", **changes) -> LLM:
    config = tiny_config(
        **{"num_hidden_layers": 1, "eos_token_ids": (EOS,), **changes},
        max_position_embeddings=next(NAMES),
    )
    weights = random_params(config, 0, copy=view == "copy")
    return LLM(config, jax.tree.map(lambda x: x.astype(config.dtype), weights))


def audited(*parts: str, model: LLM | None = None, **options) -> dict:
    some = SAMPLED if "rejection" in parts else TOKENS
    if model is None:
        # A tied head repeats its tokens: good drafts, but distributions that hardly differ from
        # one position to the next.
        model = tiny_model(tie_word_embeddings="rejection" not in parts)
    return audit(model, PROMPTS, Options(parts=parts, **{**some, **options}))


# --- The honest rule -----------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["copy", "random"])
def test_honest_rule_passes_token_by_token(view: str) -> None:
    texts = {"coupled": 16} if view == "copy" else {"greedy": 8}
    model = tiny_model(view=view, num_hidden_layers=2)
    result = audited(*texts, model=model, seeds=2, batch_size=6)
    assert not result["failures"]
    assert table(result).endswith("\nPASS")
    for part, count in texts.items():
        figures = result["parts"][part]
        assert figures["texts"] == count
        assert figures["divergences"] == []
        assert figures["acceptance_length"] > (0.2 if view == "copy" else 0.01)
        for f in (figures["orthrus"], *figures["floor"].values()):
            assert f["exact_match"] == 1.0
        for f in (figures["orthrus"], figures["floor"]["AR, no cache"]):
            assert f["flips"] == 0
            assert f["tokens"] > 8 * count
            assert f["largest_gap"] == 0


@pytest.mark.parametrize("view", ["copy", pytest.param("random", marks=slow)])
def test_honest_rule_passes_in_distribution(view: str) -> None:
    model = tiny_model(view=view, tie_word_embeddings=False)
    result = audited("rejection", model=model)
    assert not result["failures"], result["failures"]
    figures = result["parts"]["rejection"]
    assert figures["tokens"] > 1000
    assert figures["acceptance_length"] > 0.03
    assert all(abs(z) < 3 for z in figures["z"].values()), figures["z"]


TREE = Strategy("orthrus-1f", tree_nodes=6, early_blocks=2, fresh_blocks=1)


@pytest.mark.parametrize("part", ["coupled", pytest.param("greedy", marks=slow)])
def test_tree_verified_while_drafting_passes(part: str) -> None:
    result = audited(part, seeds=2, strategy=TREE)
    assert not result["failures"]
    assert result["parts"][part]["orthrus"]["exact_match"] == 1.0
    assert result["parts"][part]["acceptance_length"] > 0, "no draft was audited"


def test_tree_slots_left_uncompacted_are_failures(monkeypatch) -> None:
    monkeypatch.setattr(cache.KVCache, "compact", lambda self, first, rows: self)
    failures = audited("greedy", strategy=TREE)["failures"]
    assert {failure.text for failure in failures} == {"orthrus"}
    assert all(failure.gap > failure.limit for failure in failures)


def test_audit_of_ar_is_refused() -> None:
    with pytest.raises(UserError, match="strategy 'ar' drafts nothing"):
        Options(parts=("greedy",), strategy=Strategy("ar"))


def test_rejection_part_is_refused_for_cycles_that_emit_ar_draws() -> None:
    with pytest.raises(UserError, match=r"--cycle two-forward emits AR's own .* greedy,coupled"):
        Options(strategy=Strategy("orthrus-2f"))


@slow
def test_draft_length_option_is_the_one_audited() -> None:
    result = audited("greedy", strategy=Strategy(draft_length=2))
    assert not result["failures"]
    assert 0 < result["parts"]["greedy"]["acceptance_length"] <= 1


@slow
def test_bfloat16_passes_within_its_near_ties_and_shows_its_noise_floor() -> None:
    """Its roundings do change tokens: without an allowance the same model fails."""
    model = tiny_model(num_hidden_layers=3, dtype="bfloat16")
    options = {"seeds": 8, "temperature": 0.5, "batch_size": 16}
    result = audited("coupled", model=model, **options)
    assert not result["failures"], result["failures"]
    figures = result["parts"]["coupled"]
    floor = figures["floor"]["AR, no cache"]
    assert 0 < floor["flips"] < 0.05 * floor["tokens"]
    assert 0.5 < floor["exact_match"] < 1
    assert figures["orthrus"]["exact_match"] > 0.5
    assert 0 < floor["largest_relative_gap"] < near_tie(model.config)
    assert len(figures["divergences"]) == round(64 * (1 - figures["orthrus"]["exact_match"]))
    for d in figures["divergences"]:
        assert abs(d["gap"]) <= d["limit"]
    strict = audited("coupled", model=model, near_tie=0.0, **options)
    assert {failure.why for failure in strict["failures"]} >= {"no cache"}


# --- Planted faults ------------------------------------------------------------------------------


def always_accept_equal(drafts, predicted) -> Acceptance:
    tokens = jnp.concatenate([drafts, predicted[:, -1:]], axis=1)
    return Acceptance(tokens, jnp.full(len(drafts), drafts.shape[1]))


def bonus_off_by_one(drafts, predicted) -> Acceptance:
    """The token after the accepted drafts is taken one row too early."""
    accepted = sampling.accept_equal(drafts, predicted).accepted
    index = jnp.arange(predicted.shape[1])
    source = jnp.where((index == accepted[:, None]) & (accepted[:, None] > 0), index - 1, index)
    return Acceptance(jnp.take_along_axis(predicted, source, axis=1), accepted)


write = cache.LayerCache.write


def written_late(kv, k, v, start):
    """Only the rows of a block, which verify writes."""
    return write(kv, k, v, start + (k.shape[1] == K))


def accepted_drafts_not_written(kv, k, v, start):
    some = slice(0, 1) if k.shape[1] == K else slice(None)
    return write(kv, k[:, some], v[:, some], start)


def all_written_late(kv, k, v, start):
    """In every loop alike, the reference's among them: AR decoding agrees with it."""
    return write(kv, k, v, start + 1)


CHOICE_FAULTS = {
    "always accept": (speculative, "accept_equal", always_accept_equal),
    "bonus off by one": (speculative, "accept_equal", bonus_off_by_one),
    "a slot late": (cache.LayerCache, "write", written_late),
    "drafts not written": (cache.LayerCache, "write", accepted_drafts_not_written),
    "all a slot late": (cache.LayerCache, "write", all_written_late),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=() if name in ("always accept", "all a slot late") else slow)
        for name in CHOICE_FAULTS
    ],
)
def test_fault_shows_in_greedy_texts(fault: str, monkeypatch) -> None:
    monkeypatch.setattr(*CHOICE_FAULTS[fault])
    result = audited("greedy")
    failures = result["failures"]
    assert failures
    ours = [f for f in failures if f.text == "orthrus" and f.gap is not None]
    assert all(f.gap > f.limit > 0 for f in ours)
    assert all(f.token != f.ar_token for f in ours)
    references = {f.why for f in ours}
    if fault == "all a slot late":
        assert result["parts"]["greedy"]["orthrus"]["exact_match"] == 1.0
        assert references == {"no cache"}
        assert any(f.text == "ar" for f in failures)
    else:
        assert references == {"one row", "no cache"}
        figures = result["parts"]["greedy"]
        assert figures["orthrus"]["exact_match"] < 1
        # Both texts share the context of the first divergence: there the gap is the failure's.
        by_place = {(f.prompt, f.position): f for f in ours if f.why == "one row"}
        for d in figures["divergences"]:
            assert by_place[d["prompt"], d["position"]].gap == pytest.approx(d["gap"])
    text = table(result)
    assert "\nFAIL: " in text
    assert str(failures[0]) in text


@slow
def test_always_accept_rule_shows_in_coupled_texts(monkeypatch) -> None:
    monkeypatch.setattr(speculative, "accept_equal", always_accept_equal)
    result = audited("coupled", seeds=1)
    assert {failure.part for failure in result["failures"]} == {"coupled"}
    assert result["parts"]["coupled"]["orthrus"]["exact_match"] < 0.2


def replacing(fault):
    """The rejection rule, but its own token is drawn from another row of p where `fault` says so.

    `fault` maps accepted int32[B] and the number of drafts to: the number accepted in its stead,
    the row of p, and a mask of the rows where both apply.
    """

    def rule(drafts, target, sampler, positions) -> Acceptance:
        honest = sampling.accept_rejection(drafts, target, sampler, positions)
        drafted = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
        rows = drafted.shape[1]
        count, row, here = fault(honest.accepted, rows - 1)
        probs = sampling._at(target, row)
        own = sampling.gumbel_sample(probs, sampler, sampling._at(positions, count), NoiseKey.TOKEN)
        tokens = jnp.where(jnp.arange(rows) < count[:, None], drafted, own)
        return Acceptance(jnp.where(here[:, None], tokens, honest.tokens), count)

    return rule


RULE_FAULTS = {
    "always accept": replacing(lambda n, all: (0 * n + all, 0 * n + all, n >= 0)),
    "residual from p": replacing(lambda n, all: (n, n, n < all)),
    "bonus off by one": replacing(lambda n, all: (n, n - 1, n == all)),
}
LAW_FAULTS = {
    **{name: (speculative, "accept_rejection", rule) for name, rule in RULE_FAULTS.items()},
    "a slot late": (cache.LayerCache, "write", written_late),
    "drafts not written": (cache.LayerCache, "write", accepted_drafts_not_written),
}


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(name, marks=() if name in ("residual from p", "drafts not written") else slow)
        for name in LAW_FAULTS
    ],
)
def test_fault_shows_in_the_distribution_of_tokens(fault: str, monkeypatch) -> None:
    monkeypatch.setattr(*LAW_FAULTS[fault])
    options = {}
    if fault == "bonus off by one":
        # It follows full acceptance, which two rows per block and less noise make frequent.
        options = {"strategy": Strategy(draft_length=2), "temperature": 0.7}
    result = audited("rejection", **options)
    messages = [str(failure) for failure in result["failures"]]
    if fault in RULE_FAULTS:
        assert all("z = " in message for message in messages), messages
        assert max(abs(z) for z in result["parts"]["rejection"]["z"].values()) > 8
    else:
        assert len([message for message in messages if "log p" in message]) > 500
    assert any(message in table(result) for message in messages)


def test_answer_that_ends_too_early_is_a_failure(monkeypatch) -> None:
    model = tiny_model()
    honest = model.engine.serve

    def cut(requests, plan):
        for event in honest(requests, plan):
            if event.index == 3 and plan.strategy.method == "orthrus":
                answer = dataclasses.replace(event.completion, tokens=event.completion.tokens[:-1])
                event = dataclasses.replace(event, completion=answer)
            yield event

    monkeypatch.setattr(model.engine, "serve", cut)
    result = audited("greedy", model=model)
    (failure,) = result["failures"]
    assert (failure.prompt, failure.text) == (3, "orthrus")
    assert "must end after" in str(failure)
    (divergence,) = result["parts"]["greedy"]["divergences"]
    assert (divergence["token"], divergence["gap"]) == (None, None)
    assert "prompt 3, seed 0" in table(result)


# --- The parts -----------------------------------------------------------------------------------


def random_p_and_q(rng, tokens: int, vocab: int = 64):
    """The logits of p, p and q [tokens, 1, vocab]: different but related distributions."""
    logits = rng.normal(0, 1.5, (tokens, 1, vocab))
    guess = logits + rng.normal(0, 1.5, logits.shape)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return logits, softmax(logits), softmax(guess)


def drawn(rng, probs: np.ndarray) -> np.ndarray:
    """One token [tokens, 1] of each row."""
    below = probs.cumsum(-1) < rng.random((*probs.shape[:-1], 1)) * probs.sum(-1, keepdims=True)
    return below.sum(-1)


def stats_of(logits, p, q, x) -> TokenStats:
    arrays = (jnp.asarray(a, jnp.float32) for a in (logits, p, q))
    token_stats = reference.token_stats(*arrays, jnp.asarray(x))
    return TokenStats(*(np.asarray(a, np.float64)[:, 0] for a in token_stats))


def test_token_stats_match_plain_sums() -> None:
    """Each value of a token, and mean and variance under p, against a plain sum in float64."""
    rng = np.random.default_rng(0)
    logits, p, q = random_p_and_q(rng, 50)
    p[0, 0, :10], p[1, 0] = 0, np.eye(64)[7]
    p /= p.sum(-1, keepdims=True)
    x = drawn(rng, p)
    seen = stats_of(logits, p, q, x)
    for i, token in enumerate(x[:, 0]):
        p_i, q_i = p[i, 0], q[i, 0]
        log_p = np.log(np.where(p_i > 0, p_i, 1))
        accept = np.minimum(1, np.divide(q_i, p_i, out=np.ones(64), where=p_i > 0))
        for f, value, variance in (
            (log_p, seen.log_prob_residual[i], seen.log_prob_variance[i]),
            (accept, seen.accept_prob[i], seen.accept_prob_variance[i]),
        ):
            mean = (p_i * f).sum()
            assert value == pytest.approx(f[token] - mean, abs=1e-5)
            assert variance == pytest.approx((p_i * f**2).sum() - mean**2, abs=1e-5)
        assert seen.before[i] == pytest.approx(p_i[:token].sum(), abs=1e-5)
        assert seen.likelier[i] == pytest.approx(p_i[p_i > p_i[token]].sum(), abs=1e-5)
        log_softmax = logits[i, 0] - np.log(np.exp(logits[i, 0]).sum())
        assert seen.log_prob[i] == pytest.approx(log_softmax[token], abs=1e-5)


def test_honest_tokens_are_normal_in_every_statistic() -> None:
    """200 audits of 500 tokens: each z has mean 0 and deviation 1, and none is over the limit."""
    rng = np.random.default_rng(1)
    logits, p, q = random_p_and_q(rng, 100_000)
    pooled = stats_of(logits, p, q, drawn(rng, p))
    audits = [TokenStats(*(x[i::200] for x in pooled)) for i in range(200)]
    scores = [audit_law.law_statistics(stats)["z"] for stats in audits]
    for name in scores[0]:
        z = np.array([by_name[name] for by_name in scores])
        assert abs(z.mean()) < 0.25, name
        assert 0.85 < z.std() < 1.15, name
        assert abs(z).max() < audit_law.Z_LIMIT, name


@pytest.mark.parametrize("excess", [0.1, 1.0])
def test_rule_that_accepts_too_much_shows_in_the_emitted_tokens(excess) -> None:
    """A share of the drafts is accepted whatever p is; the tokens are enough to show that."""
    rng = np.random.default_rng(2)
    tokens = 20_000 if excess < 1 else 400
    logits, p, q = random_p_and_q(rng, tokens)
    q = np.eye(64)[q.argmax(-1)]  # what the drafter proposes: its likeliest token
    x = np.where(rng.random((tokens, 1)) < excess, drawn(rng, q), drawn(rng, p))
    z = audit_law.law_statistics(stats_of(logits, p, q, x))["z"]
    accept = np.minimum(1, q / p)
    moved = excess * (((q - p) * accept).sum(-1)).sum()
    spread = math.sqrt(((p * accept**2).sum(-1) - (p * accept).sum(-1) ** 2).sum())
    assert moved / spread > 6, "the fault should be large enough to show"
    assert z["drafter's favour"] > audit_law.Z_LIMIT


def test_uniform_z_is_the_chi_square_on_a_normal_scale() -> None:
    for chi_square in (8.0, 19.0, 43.0, 54.5, 60.0):
        counts = np.full(20, 1000)
        off = math.sqrt(chi_square * 1000 / 2)
        counts[3], counts[11] = 1000 + round(off), 1000 - round(off)
        points = np.repeat((np.arange(20) + 0.5) / 20, counts)
        exact = stats.norm.isf(stats.chi2.sf(chi_square, 19))
        assert audit_law.uniform_z(points) == pytest.approx(exact, abs=0.1)


def test_anchor_of_each_token_is_that_of_its_cycle() -> None:
    answer = lambda tokens, accepted: Completion("", [0] * tokens, "", 0, accepted, 1, 0.0, 0.0)
    assert audit_module._anchors(5, answer(1, [])) == [4]
    # The first token; then 2 drafts and one more; one more alone; a cycle cut by the budget.
    assert audit_module._anchors(5, answer(7, [2, 0, 2])) == [4, 5, 5, 5, 8, 9, 9]


def test_anchors_are_those_the_drafts_came_from() -> None:
    """The drafter, run again by the reference, proposes the drafts that were accepted."""
    model = tiny_model(view="copy")
    run = Audit(model, PROMPTS, Options(parts=("rejection",), **SAMPLED))
    requests = run.requests("rejection")[:32]
    answers = run.decode(requests, "rejection")
    all_stats = run.read_again(reference.one_row, requests, answers, answers, block=K)
    accepted = 0
    for answer, its in zip(answers, all_stats, strict=True):
        at = 1
        for n in answer.accepted:
            # min(1, q / p) of a draft that was accepted is 1, and its mean is p of the draft.
            np.testing.assert_allclose(
                its.accept_prob[at : at + n] + its.own[at : at + n], 1, atol=1e-4
            )
            accepted, at = accepted + n, at + n + 1
    assert accepted > 100


def test_near_tie_depends_on_dtype_and_depth() -> None:
    at = lambda **changes: near_tie(tiny_config(**changes))
    assert at(num_hidden_layers=28) == 1e-3
    assert at(num_hidden_layers=4, dtype="bfloat16") == pytest.approx(8 * 2**-8 * 3)
    assert at(num_hidden_layers=4, dtype="float16") == pytest.approx(8 * 2**-11 * 3)
    assert at(dtype="bfloat16") < at(dtype="bfloat16", num_hidden_layers=28) < 0.3


# --- The command ---------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ["What is 7 times 8?", "Tom has 12 apples and buys 30 more. How many has he?"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def arguments(directory, prompts, *more: str) -> list[str]:
    sizes = ["--max-new-tokens", "60", "--seeds", "2", "--batch-size", "4"]
    return ["--model", str(directory), "--prompts", str(prompts), *sizes, *more]


@slow
def test_command_audits_the_demo_base(tiny_base, prompts, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    lossless.main(arguments(tiny_base, prompts, "--dtype", "bfloat16", "--json", str(out)))
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    config = dataclasses.replace(read_config(tiny_base).config, dtype="bfloat16")
    assert text.endswith("\nPASS\n")
    assert result["failures"] == []
    assert result["dtype"] == "bfloat16"
    assert result["near_tie"] == pytest.approx(near_tie(config))
    assert set(result["parts"]) == set(audit_module.PARTS)
    assert result["parts"]["greedy"]["texts"] == 2
    assert result["parts"]["rejection"]["texts"] == 4
    assert f"near-tie: {result['near_tie']:.4g}" in text
    for name in ("Orthrus", "AR, batch 1", "AR, no cache"):
        assert f"| greedy | {name} | 2 | " in text


def test_command_names_the_failure_and_exits_1(
    tiny_base, prompts, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(speculative, "accept_equal", always_accept_equal)
    other, out = tmp_path / "model", tmp_path / "out.json"
    shutil.copytree(tiny_base, other)
    config = json.loads((other / "config.json").read_text())
    config["max_position_embeddings"] = next(NAMES)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as end:
        lossless.main(arguments(other, prompts, "--parts", "greedy", "--json", str(out)))
    assert end.value.code == 1
    text, failures = capsys.readouterr().out, json.loads(out.read_text())["failures"]
    first = failures[0]
    assert (first["part"], first["text"], first["why"]) == ("greedy", "orthrus", "one row")
    assert f"greedy: prompt {first['prompt']}, seed 0, position {first['position']}: " in text
    assert f"emitted {first['token']}, AR takes {first['ar_token']}: gap " in text
    assert f"FAIL: {len(failures)} failures" in text


BAD = {
    "no limit": (["--limit", "0"], "--limit 0 must be at least 1"),
    "no seeds": (["--seeds", "0"], "--seeds 0 must be at least 1"),
    "cold": (["--temperature", "0"], "--temperature 0 leaves nothing to sample"),
    "colder": (["--temperature", "-1"], "temperature=-1.0 must be 0 or more"),
    "no such part": (["--parts", "greedy,beam"], "--parts names beam: expected some of greedy"),
    "a negative tie": (["--near-tie", "-1"], "--near-tie -1.0 must be 0 or more"),
    "a tie that is no number": (["--near-tie", "nan"], "--near-tie nan must be 0 or more"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens=0 must be at least 1"),
    "no batch": (["--batch-size", "0"], "batch_size=0 must be at least 1"),
    "no draft": (["--draft-length", "1"], "draft_length=1 must be from 2 to"),
    "too long": (["--max-new-tokens", "4000"], "over the model's"),
    "too few tokens": (
        ["--parts", "rejection", "--max-new-tokens", "3"],
        "raise --seeds, --limit or --max-new-tokens to have at least 100",
    ),
    "a tree without its cycle": (
        ["--tree-nodes", "8"],
        "--tree-nodes 8 needs --cycle two-forward or one-forward",
    ),
    "nowhere to write": (["--json", "no/such/place.json"], "its directory does not exist"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow if n == "too few tokens" else ()) for n in BAD]
)
def test_bad_input_is_refused_in_one_line(name: str, tiny_base, prompts) -> None:
    options, message = BAD[name]
    with pytest.raises(UserError) as error:
        lossless.main(arguments(tiny_base, prompts, *options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_base_without_mask_and_file_without_prompts_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no mask_token_id"):
        audited("greedy", model=tiny_model(mask_token_id=None))
    with pytest.raises(UserError, match="no prompt to audit"):
        audit(tiny_model(), [], Options())
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        lossless.main(["--model", "unread", "--prompts", str(empty)])
