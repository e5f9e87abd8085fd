"""The audit passes an exact decoder and refuses inexact ones: faults planted in rule and cache.

Every model here is tiny, and its diffusion view untrained: a copy of the AR attention, or random.
A fault is traced into programs of its own, because each model has its own config: a name, told by
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
from eval import judges, lossless
from eval.audit import Audit, Options, audit
from eval.judges import Law, near_tie
from eval.lossless import table
from orthrus_jax.attention import cache
from orthrus_jax.config import ModelConfig
from orthrus_jax.decoding import sampling, speculative
from orthrus_jax.decoding.sampling import Proposal, Purpose
from orthrus_jax.decoding.speculative import Verdict
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


def generator(*, view: str = "copy", **changes) -> LLM:
    config = tiny_config(
        **{"num_hidden_layers": 1, "eos_token_ids": (EOS,), **changes},
        max_position_embeddings=next(NAMES),
    )
    weights = random_params(config, 0, copy=view == "copy")
    return LLM(config, jax.tree.map(lambda x: x.astype(config.dtype), weights))


def audited(*parts: str, made: LLM | None = None, **options) -> dict:
    some = SAMPLED if "rejection" in parts else TOKENS
    if made is None:
        # A tied head says again and again what it has said: good drafts, and a law that hardly
        # tells one position from the next.
        made = generator(tie_word_embeddings="rejection" not in parts)
    return audit(made, PROMPTS, Options(parts=parts, **{**some, **options}))


# --- The honest rule -----------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["copy", "random"])
def test_the_honest_rule_passes_token_by_token(view: str) -> None:
    texts = {"coupled": 16} if view == "copy" else {"greedy": 8}
    made = generator(view=view, num_hidden_layers=2)
    result = audited(*texts, made=made, seeds=2, batch_size=6)
    assert not result["failures"]
    assert table(result).endswith("\nPASS")
    for part, count in texts.items():
        found = result["parts"][part]
        assert found["texts"] == count
        assert found["divergences"] == []
        assert found["acceptance_length"] > (0.2 if view == "copy" else 0.01)
        for f in (found["orthrus"], *found["floor"].values()):
            assert f["exact_match"] == 1.0
        for f in (found["orthrus"], found["floor"]["AR, no cache"]):
            assert f["flips"] == 0
            assert f["tokens"] > 8 * count
            assert f["largest_gap"] == 0


@pytest.mark.parametrize(
    ("view", "proposal"), [("copy", "draw"), pytest.param("random", "argmax", marks=slow)]
)
def test_the_honest_rule_passes_in_law(view: str, proposal: str) -> None:
    made = generator(view=view, tie_word_embeddings=False)
    result = audited("rejection", made=made, proposal=proposal)
    assert not result["failures"], result["failures"]
    found = result["parts"]["rejection"]
    assert found["tokens"] > 1000
    assert found["acceptance_length"] > 0.03
    assert all(abs(z) < 3 for z in found["z"].values()), found["z"]


TREE = {"cycle": "one-forward", "early_blocks": 2, "fresh_blocks": 1, "tree_nodes": 6}


@pytest.mark.parametrize("part", ["coupled", pytest.param("greedy", marks=slow)])
def test_a_tree_verified_while_drafting_passes(part: str) -> None:
    result = audited(part, seeds=2, **TREE)
    assert not result["failures"]
    assert result["parts"][part]["orthrus"]["exact_match"] == 1.0
    assert result["parts"][part]["acceptance_length"] > 0, "no draft was audited"


def test_a_tree_s_slots_left_where_they_were_show(monkeypatch) -> None:
    monkeypatch.setattr(cache.KVCache, "compact", lambda self, first, rows: self)
    cases = audited("greedy", **TREE)["failures"]
    assert {case.text for case in cases} == {"orthrus"}
    assert all(case.gap > case.limit for case in cases)


def test_the_law_is_not_asked_of_a_cycle_without_a_rule_of_its_own() -> None:
    with pytest.raises(UserError, match=r"--cycle two-forward says AR's own .* greedy,coupled"):
        Options(cycle="two-forward")


@slow
def test_the_draft_length_asked_for_is_the_one_audited() -> None:
    result = audited("greedy", draft_length=2)
    assert not result["failures"]
    assert 0 < result["parts"]["greedy"]["acceptance_length"] <= 1


@slow
def test_bfloat16_passes_within_its_near_ties_and_shows_its_noise_floor() -> None:
    """Its roundings do turn tokens: without an allowance the same model fails."""
    made = generator(num_hidden_layers=3, dtype="bfloat16")
    some = {"seeds": 8, "temperature": 0.5, "batch_size": 16}
    result = audited("coupled", made=made, **some)
    assert not result["failures"], result["failures"]
    found = result["parts"]["coupled"]
    floor = found["floor"]["AR, no cache"]
    assert 0 < floor["flips"] < 0.05 * floor["tokens"]
    assert 0.5 < floor["exact_match"] < 1
    assert found["orthrus"]["exact_match"] > 0.5
    assert 0 < floor["largest_relative_gap"] < near_tie(made.config)
    assert len(found["divergences"]) == round(64 * (1 - found["orthrus"]["exact_match"]))
    for d in found["divergences"]:
        assert abs(d["gap"]) <= d["limit"]
    strict = audited("coupled", made=made, near_tie=0.0, **some)
    assert {case.why for case in strict["failures"]} >= {"no cache"}


# --- Planted faults ------------------------------------------------------------------------------


def always_accept_equal(drafts, predicted) -> Verdict:
    tokens = jnp.concatenate([drafts, predicted[:, -1:]], axis=1)
    return Verdict(tokens, jnp.full(len(drafts), drafts.shape[1]))


def bonus_off_by_one(drafts, predicted) -> Verdict:
    """What follows the accepted drafts is taken from the row before the one behind them."""
    accepted = sampling.accept_equal(drafts, predicted).accepted
    index = jnp.arange(predicted.shape[1])
    source = jnp.where((index == accepted[:, None]) & (accepted[:, None] > 0), index - 1, index)
    return Verdict(jnp.take_along_axis(predicted, source, axis=1), accepted)


write = cache.LayerCache.write


def written_late(kv, k, v, start):
    """Only what verify writes: the rows of a block."""
    return write(kv, k, v, start + (k.shape[1] == K))


def accepted_drafts_not_written(kv, k, v, start):
    some = slice(0, 1) if k.shape[1] == K else slice(None)
    return write(kv, k[:, some], v[:, some], start)


def all_written_late(kv, k, v, start):
    """In every loop alike, the judge's among them: AR decoding agrees with it."""
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
def test_a_fault_shows_in_greedy_texts(fault: str, monkeypatch) -> None:
    monkeypatch.setattr(*CHOICE_FAULTS[fault])
    result = audited("greedy")
    cases = result["failures"]
    assert cases
    ours = [case for case in cases if case.text == "orthrus" and case.gap is not None]
    assert all(case.gap > case.limit > 0 for case in ours)
    assert all(case.token != case.ar_token for case in ours)
    judges = {case.why for case in ours}
    if fault == "all a slot late":
        assert result["parts"]["greedy"]["orthrus"]["exact_match"] == 1.0
        assert judges == {"no cache"}
        assert any(case.text == "ar" for case in cases)
    else:
        assert judges == {"one row", "no cache"}
        found = result["parts"]["greedy"]
        assert found["orthrus"]["exact_match"] < 1
        # The first divergence is judged at a context both share: there the gap is the case's.
        by_place = {(c.prompt, c.position): c for c in ours if c.why == "one row"}
        for d in found["divergences"]:
            assert by_place[d["prompt"], d["position"]].gap == pytest.approx(d["gap"])
    said = table(result)
    assert "\nFAIL: " in said
    assert str(cases[0]) in said


@slow
def test_an_always_accept_rule_shows_in_coupled_texts(monkeypatch) -> None:
    monkeypatch.setattr(speculative, "accept_equal", always_accept_equal)
    result = audited("coupled", seeds=1)
    assert {case.part for case in result["failures"]} == {"coupled"}
    assert result["parts"]["coupled"]["orthrus"]["exact_match"] < 0.2


def replacing(whose):
    """The rejection rule, but its own token is drawn from another row of p where `whose` says.

    `whose` maps accepted int32[B] and the drafts' number to: the number accepted in its stead, the
    row of p, and where all this is so.
    """

    def rule(drafts, target, sampler, positions) -> Verdict:
        honest = sampling.accept_rejection(drafts, target, sampler, positions)
        drafted = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
        rows = drafted.shape[1]
        count, row, here = whose(honest.accepted, rows - 1)
        probs = sampling._at(target, row)
        own = sampling.draw(probs, sampler, sampling._at(positions, count), Purpose.TOKEN)
        tokens = jnp.where(jnp.arange(rows) < count[:, None], drafted, own)
        return Verdict(jnp.where(here[:, None], tokens, honest.tokens), count)

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
    ("fault", "proposal"),
    [
        ("residual from p", "draw"),
        ("drafts not written", "draw"),
        *(
            pytest.param(*case, marks=slow)
            for case in [
                *(
                    (fault, "draw")
                    for fault in ("always accept", "bonus off by one", "a slot late")
                ),
                *((fault, "argmax") for fault in ("always accept", "residual from p")),
            ]
        ),
    ],
)
def test_a_fault_shows_in_the_law_of_tokens(fault: str, proposal: str, monkeypatch) -> None:
    monkeypatch.setattr(*LAW_FAULTS[fault])
    # Two rows a block: full acceptance, which a bonus follows, is then often.
    made = {"draft_length": 2} if fault == "bonus off by one" else {}
    result = audited("rejection", proposal=proposal, **made)
    cases = [str(case) for case in result["failures"]]
    if fault in RULE_FAULTS:
        assert all("z = " in case for case in cases), cases
        assert max(abs(z) for z in result["parts"]["rejection"]["z"].values()) > 8
    else:
        assert len([case for case in cases if "log p" in case]) > 500
    assert any(case in table(result) for case in cases)


def test_an_answer_that_ends_early_or_late_is_a_case(monkeypatch) -> None:
    made = generator()
    honest = made.engine.serve

    def cut(requests, plan):
        for event in honest(requests, plan):
            if event.index == 3 and plan.mode == "orthrus":
                whole = event.completion
                answer = dataclasses.replace(whole, tokens=whole.tokens[:-1])
                event = dataclasses.replace(event, completion=answer)
            yield event

    monkeypatch.setattr(made.engine, "serve", cut)
    result = audited("greedy", made=made)
    (case,) = result["failures"]
    assert (case.prompt, case.text) == (3, "orthrus")
    assert "must end after" in str(case)
    (divergence,) = result["parts"]["greedy"]["divergences"]
    assert (divergence["token"], divergence["gap"]) == (None, None)
    assert "prompt 3, seed 0" in table(result)


# --- The parts -----------------------------------------------------------------------------------


def some_law(rng, tokens: int, vocab: int = 64):
    """p and q [tokens, 1, vocab], unlike but related, and the logits p is made of."""
    logits = rng.normal(0, 1.5, (tokens, 1, vocab))
    guess = logits + rng.normal(0, 1.5, logits.shape)
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    return logits, softmax(logits), softmax(guess)


def drawn(rng, probs: np.ndarray) -> np.ndarray:
    """One token [tokens, 1] of each row."""
    below = probs.cumsum(-1) < rng.random((*probs.shape[:-1], 1)) * probs.sum(-1, keepdims=True)
    return below.sum(-1)


def read_law(logits, p, q, x) -> Law:
    found = judges.law(*(jnp.asarray(a, jnp.float32) for a in (logits, p, q)), jnp.asarray(x))
    return Law(*(np.asarray(a, np.float64)[:, 0] for a in found))


def test_the_statistics_of_a_law_are_its_own() -> None:
    """Each of a token's values, and mean and variance under p, against a plain sum in float64."""
    rng = np.random.default_rng(0)
    logits, p, q = some_law(rng, 50)
    p[0, 0, :10], p[1, 0] = 0, np.eye(64)[7]
    p /= p.sum(-1, keepdims=True)
    x = drawn(rng, p)
    seen = read_law(logits, p, q, x)
    for i, token in enumerate(x[:, 0]):
        p_i, q_i = p[i, 0], q[i, 0]
        log_p = np.log(np.where(p_i > 0, p_i, 1))
        favour = np.minimum(1, np.divide(q_i, p_i, out=np.ones(64), where=p_i > 0))
        for f, value, variance in (
            (log_p, seen.surprise[i], seen.surprise_variance[i]),
            (favour, seen.favour[i], seen.favour_variance[i]),
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
    logits, p, q = some_law(rng, 100_000)
    seen = read_law(logits, p, q, drawn(rng, p))
    audits = [Law(*(x[i::200] for x in seen)) for i in range(200)]
    found = [audit_module.law_statistics(some)["z"] for some in audits]
    for name in found[0]:
        z = np.array([f[name] for f in found])
        assert abs(z.mean()) < 0.25, name
        assert 0.85 < z.std() < 1.15, name
        assert abs(z).max() < audit_module.Z_LIMIT, name


@pytest.mark.parametrize("proposal", ["draw", "argmax"])
@pytest.mark.parametrize("excess", [0.1, 1.0])
def test_a_rule_that_accepts_too_much_is_seen_from_the_tokens_said(excess, proposal) -> None:
    """A share of the drafts accepted whatever p says: as many tokens as would show it do."""
    rng = np.random.default_rng(2)
    tokens = 20_000 if excess < 1 else 400
    logits, p, q = some_law(rng, tokens)
    if proposal == "argmax":
        q = np.eye(64)[q.argmax(-1)]
    x = np.where(rng.random((tokens, 1)) < excess, drawn(rng, q), drawn(rng, p))
    z = audit_module.law_statistics(read_law(logits, p, q, x))["z"]
    favour = np.minimum(1, q / p)
    moved = excess * (((q - p) * favour).sum(-1)).sum()
    spread = math.sqrt(((p * favour**2).sum(-1) - (p * favour).sum(-1) ** 2).sum())
    assert moved / spread > 6, "the case is meant to be one that shows"
    assert z["drafter's favour"] > audit_module.Z_LIMIT


def test_a_chi_square_on_a_normal_s_scale() -> None:
    for chi_square in (8.0, 19.0, 43.0, 54.5, 60.0):
        counts = np.full(20, 1000)
        off = math.sqrt(chi_square * 1000 / 2)
        counts[3], counts[11] = 1000 + round(off), 1000 - round(off)
        points = np.repeat((np.arange(20) + 0.5) / 20, counts)
        exact = stats.norm.isf(stats.chi2.sf(chi_square, 19))
        assert audit_module.uniform_z(points) == pytest.approx(exact, abs=0.1)


def test_each_token_s_anchor_is_that_of_its_cycle() -> None:
    answer = lambda n, accepted: Completion("", [0] * n, "", len(accepted), accepted, 1, 0.0, 0.0)
    assert audit_module._anchors(5, answer(1, [])) == [4]
    # The first token; then 2 drafts and one more; one more alone; a cycle cut by the budget.
    assert audit_module._anchors(5, answer(7, [2, 0, 2])) == [4, 5, 5, 5, 8, 9, 9]


def test_the_anchors_are_those_the_drafts_came_from() -> None:
    """The argmax drafter, asked again by the judge, names the drafts that were accepted."""
    made = generator(view="copy")
    run = Audit(made, PROMPTS, Options(parts=("rejection",), **SAMPLED))
    requests = run.requests("rejection")[:32]
    answers = run.decode(requests, proposal=Proposal.ARGMAX)
    laws = run.judge(judges.one_row, requests, answers, answers, block=K, proposal=Proposal.ARGMAX)
    accepted = 0
    for answer, seen in zip(answers, laws, strict=True):
        at = 1
        for n in answer.accepted:
            # min(1, q / p) of a draft that was accepted is 1, and its mean is p of the draft.
            np.testing.assert_allclose(
                seen.favour[at : at + n] + seen.own[at : at + n], 1, atol=1e-4
            )
            accepted, at = accepted + n, at + n + 1
    assert accepted > 100


def test_near_ties_by_dtype_and_depth() -> None:
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
def test_the_command_audits_the_demo_s_base(tiny_base, prompts, tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    lossless.main(arguments(tiny_base, prompts, "--dtype", "bfloat16", "--json", str(out)))
    said, found = capsys.readouterr().out, json.loads(out.read_text())
    assert said.endswith("\nPASS\n")
    assert found["failures"] == []
    assert found["dtype"] == "bfloat16"
    assert found["near_tie"] == pytest.approx(near_tie(made_config(tiny_base)))
    assert set(found["parts"]) == set(audit_module.PARTS)
    assert found["parts"]["greedy"]["texts"] == 2
    assert found["parts"]["rejection"]["texts"] == 4
    assert f"near-tie: {found['near_tie']:.4g}" in said
    for name in ("Orthrus", "AR, batch 1", "AR, no cache"):
        assert f"| greedy | {name} | 2 | " in said


def made_config(directory) -> ModelConfig:
    return dataclasses.replace(ModelConfig.from_directory(directory), dtype="bfloat16")


def test_the_command_names_the_case_and_exits_1(
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
    said, cases = capsys.readouterr().out, json.loads(out.read_text())["failures"]
    first = cases[0]
    assert (first["part"], first["text"], first["why"]) == ("greedy", "orthrus", "one row")
    assert f"greedy: prompt {first['prompt']}, seed 0, position {first['position']}: " in said
    assert f"emitted {first['token']}, AR takes {first['ar_token']}: gap " in said
    assert f"FAIL: {len(cases)} cases" in said


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
    "too little to judge": (
        ["--parts", "rejection", "--max-new-tokens", "3"],
        "raise --seeds, --limit or --max-new-tokens to have at least 100",
    ),
    "nowhere to write": (["--json", "no/such/place.json"], "its directory does not exist"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow if n == "too little to judge" else ()) for n in BAD]
)
def test_bad_input_is_told_in_one_line(name: str, tiny_base, prompts) -> None:
    options, message = BAD[name]
    with pytest.raises(UserError) as error:
        lossless.main(arguments(tiny_base, prompts, *options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_base_without_a_mask_and_a_file_without_prompts_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="no mask_token_id"):
        audited("greedy", made=generator(mask_token_id=None))
    with pytest.raises(UserError, match="no prompt to audit"):
        audit(generator(), [], Options())
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(UserError, match="holds no prompt"):
        lossless.main(["--model", "unread", "--prompts", str(empty)])
