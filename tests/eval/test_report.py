"""The numbers of a run against rows made by hand, and their tables and page."""

import html.parser
import json
import re

import pytest

from eval import plots, records, report
from eval.metrics import numbers, pass_at, wilson
from eval.records import read_answers
from orthrus_jax.errors import UserError
from tests.support.run_files import answer, both, recipe, row, save


def test_wilson_matches_the_textbook():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.862, 500) == pytest.approx((0.829, 0.8895), abs=1e-3)
    assert wilson(0.3, 0) == (0.0, 1.0)


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    assert pass_at(1, 1, 4) == 0.25
    assert pass_at(2, 1, 4) == 0.5  # 3 of the 6 pairs hold it
    assert pass_at(2, 2, 4) == pytest.approx(5 / 6)
    assert pass_at(4, 1, 4) == 1.0
    assert pass_at(3, 0, 4) == 0.0
    assert pass_at(4, 4, 4) == 1.0


def test_mean_at_n_and_pass_at_k_of_hand_made_counts():
    """4, 1 and 0 right of 4 samples: mean 5/12; pass@2 (1 + 1/2 + 0) / 3."""
    right = {"a": 4, "b": 1, "c": 0}
    rows = [
        row(
            name,
            [answer("orthrus", [1], sample=i, correct=i < count) for i in range(4)],
            {"orthrus": 1.0},
        )
        for name, count in right.items()
    ]
    figures = numbers(recipe(mode="orthrus", n=4, temperature=1.0), rows)["loops"]["orthrus"]
    assert figures["accuracy"] == pytest.approx(5 / 12)
    assert figures["accuracy_interval"] == list(wilson(5 / 12, 3))
    assert figures["pass_at"] == pytest.approx({"1": 5 / 12, "2": 0.5, "4": 2 / 3})


def test_acceptance_and_tokens_per_forward_pooled_and_by_problem():
    """Cycles accept 2 0 3, and 1: 9 tokens in 7 forwards, 3 in 3."""
    rows = [both("a", [2, 0, 3]), both("b", [1])]
    result = numbers(recipe(), rows)
    figures = result["loops"]["orthrus"]
    assert (figures["tokens"], figures["forwards"], figures["cycles"]) == (12, 10, 4)
    assert figures["tokens_per_forward"] == pytest.approx((9 / 7 + 3 / 3) / 2)
    assert figures["tokens_per_forward_pooled"] == pytest.approx(12 / 10)
    assert figures["acceptance_length"] == pytest.approx(6 / 4)
    assert figures["acceptance_length_of_problems"] == pytest.approx((5 / 3 + 1) / 2)
    assert figures["acceptance_by_position"] == [0.75, 0.5, 0.25]
    assert figures["accepted_distribution"] == [0.25, 0.25, 0.25, 0.25]
    assert sum(figures["acceptance_by_position"]) == pytest.approx(figures["acceptance_length"])
    ar = result["loops"]["ar"]
    assert ar["tokens_per_forward"] == ar["tokens_per_forward_pooled"] == 1.0
    assert "acceptance_length" not in ar


def test_drafts_accepted_beyond_the_block_are_counted():
    """K = 4, but a tree or blocks drafted ahead had 5 drafts accepted in a cycle."""
    rows = [both("a", [2, 5, 3]), both("b", [0])]
    figures = numbers(recipe(), rows)["loops"]["orthrus"]
    assert figures["cycles"] == 4
    assert figures["acceptance_length"] == pytest.approx(10 / 4)
    assert figures["acceptance_length_of_problems"] == pytest.approx((10 / 3 + 0) / 2)
    assert figures["acceptance_by_position"] == [0.75, 0.75, 0.5, 0.25, 0.25]
    assert figures["accepted_distribution"] == [0.25, 0, 0.25, 0.25, 0, 0.25]
    assert sum(figures["acceptance_by_position"]) == pytest.approx(figures["acceptance_length"])
    assert sum(figures["accepted_distribution"]) == pytest.approx(1)


def test_problem_of_several_answers_counts_once():
    """Samples and turns are pooled inside their question: 3 + 9 tokens in 3 + 7 forwards."""
    answers = [answer("orthrus", [1]), answer("orthrus", [2, 0, 3], turn=1)]
    ungraded = recipe(mode="orthrus") | {"graded": False}
    loop = numbers(ungraded, [row("a", answers, {"orthrus": 1.0})])["loops"]["orthrus"]
    assert loop["tokens_per_forward"] == loop["tokens_per_forward_pooled"] == 1.2
    assert (loop["problems"], loop["answers"]) == (1, 2)


def test_times_are_those_of_the_whole_run():
    rows = [
        both("a", [2, 0, 3], {"ar": 3.0, "orthrus": 1.0}),
        both("b", [1], {"ar": 1.0, "orthrus": 1.0}),
    ]
    result = numbers(recipe(batch_size=8), rows)
    assert result["speedup"] == 2.0
    assert result["speedup_range"] == [1.0, 3.0]
    assert result["loops"]["ar"]["tokens_per_second"] == 12 / 4
    assert result["loops"]["ar"]["first_token_ms"] == 250
    assert result["loops"]["orthrus"]["tokens_per_second"] == 12 / 2


def test_groups_have_their_own_times_at_batch_1_only():
    rows = [
        both("a", [2], level="10", subject="B"),
        both("b", [0], level="2", subject="A", correct=False),
        both("c", [1], level="2", subject="B"),
    ]
    for line in rows:
        line["answers"][0]["seconds"] = 3.0
    groups = numbers(recipe(), rows)["groups"]
    assert list(groups["level"]) == ["2", "10"]
    assert list(groups["subject"]) == ["B", "A"]
    second = groups["level"]["2"]
    assert second["loops"]["orthrus"]["accuracy"] == 0.5
    assert second["loops"]["orthrus"]["acceptance_length"] == 0.5
    assert second["loops"]["orthrus"]["tokens_per_second"] == 5 / 2
    assert second["speedup"] == 3.0
    batched = numbers(recipe(batch_size=2), rows)["groups"]["level"]["2"]
    assert "speedup" not in batched
    assert "tokens_per_second" not in batched["loops"]["ar"]


def test_same_text_is_counted_where_exactness_promises_it():
    rows = [both("a", [1]), both("b", [1], digest="other"), both("c", [2])]
    result = numbers(recipe(), rows)
    assert result["same_text"] == pytest.approx(2 / 3)
    assert result["unlike"] == ["b"]
    assert "same_text" not in numbers(recipe(temperature=0.7), rows)
    assert "same_text" in numbers(recipe(temperature=0.7, accept="coupled"), rows)


def test_prompt_that_did_not_fit_is_wrong_and_not_timed():
    skipped = {"sample": 0, "turn": 0, "skipped": "long", "correct": False, "note": "skipped"}
    lines = [{"loop": loop} | skipped for loop in records.LOOPS]
    nothing = numbers(recipe(), [row("a", lines, {"ar": 0.0, "orthrus": 0.0}, level="1")])
    assert nothing["loops"]["orthrus"]["skipped"] == 1
    assert nothing["loops"]["orthrus"]["tokens_per_forward"] == 0.0
    assert "speedup" not in nothing
    report.page({"a": nothing})
    some = numbers(recipe(), [row("a", lines), both("b", [1])])
    for loop in some["loops"].values():
        assert (loop["accuracy"], loop["answers"], loop["skipped"]) == (0.5, 1, 1)
        assert loop["notes"] == {"skipped": 1}
    assert some["loops"]["orthrus"]["tokens_per_forward"] == 1.0


def test_run_without_answers_has_a_report():
    result = numbers(recipe(), [])
    assert result["answered"] == 0
    assert "unfinished: 0 of 4 problems" in report.text({"a": result})
    report.page({"a": result})


def test_run_without_grades_has_no_accuracy():
    result = numbers(recipe() | {"graded": False}, [both("a", [1])])
    assert "accuracy" not in result["loops"]["ar"]
    assert "accuracy" not in report.text({"a": result})


def test_table_shows_the_numbers():
    rows = [both("a", [2, 0, 3], level="1"), both("b", [1], level="2", correct=False)]
    result = numbers(recipe(), rows)
    text = report.text({"run": result})
    lines = [re.split(r"\s*\|\s*", line)[1:-1] for line in text.splitlines() if "orthrus" in line]
    assert lines[0] == [
        *("run", "MATH-500", "some/<model>", "orthrus", "2", "50.0 % (9.5-90.5)", "1.50"),
        *("1.14 / 1.20", "12", "12.0", "250.0", "2.00", "100.0 %"),
    ]
    assert "| level | loop" in text
    assert "accepted by position: 0.75 0.50 0.25" in text
    assert "unfinished: 2 of 4 problems" in text
    untrained = report.text({"run": result | {"trained": False}})
    assert "untrained" in untrained
    assert "untrained" not in text
    apart = report.text({"run": result | {"speedup_range": [1.5, 3.0]}})
    assert "| 2.00 (1.50-3.00) |" in apart


def test_long_names_and_dollars_are_drawn_as_text():
    long = "runs/a-very-long-name-of-a-run-that-would-overlap-its-neighbour"
    results = {f"{long}-{i}": numbers(recipe(), [both("a", [2])]) for i in range(2)}
    results["from $5 to $6^_"] = numbers(recipe(), [both("a", [1])])
    content = report.page(results)
    svg = content[content.index("<svg") : content.index("</svg>")]
    texts = [html.unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]
    assert "from $5 to $6^_" in texts
    assert max(map(len, texts)) <= len("orthrus, ") + plots.LONGEST
    colors = set(re.findall(r"fill: (#\w{6})", svg))
    assert {"#1f77b4", "#ff7f0e", "#2ca02c"} <= colors, "a colour per run"


class Page(html.parser.HTMLParser):
    """Checks that tags match, and collects what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.count = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_no_network():
    rows = [both("a", [2, 0, 3], level="1<b>"), both("b", [1], level="2")]
    content = report.page({"run & <i>": numbers(recipe(), rows)})
    page = Page()
    page.feed(content)
    assert page.open == []
    assert page.count["svg"] == 2
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)|@import|<script|<link", content)
    assert "some/&lt;model&gt;" in content
    assert "1<b>" not in content
    ids = re.findall(r'\bid="(clip|p)?(\w{11})"', content)
    assert len(ids) == len(set(ids))
    assert content == report.page({"run & <i>": numbers(recipe(), rows)})


def test_torn_or_damaged_last_line_is_left_out(tmp_path):
    path = tmp_path / records.ANSWERS
    whole = [json.dumps(both(name, [1])).encode() for name in "abc"]
    begin = b"\n".join(whole[:2]) + b"\n"
    for end in range(len(whole[2]) + 1):
        path.write_bytes(begin + whole[2][:end])
        rows, size = read_answers(path, recipe())
        assert [row["id"] for row in rows] == ["a", "b"]
        assert size == len(begin)
    path.write_bytes(begin + whole[2] + b"\n")
    assert [row["id"] for row in read_answers(path, recipe())[0]] == ["a", "b", "c"]
    path.write_bytes(begin + whole[2][:30] + b"\n")
    assert read_answers(path, recipe())[1] == len(begin)
    path.write_bytes(begin + b"\0" * 300)
    assert read_answers(path, recipe())[1] == len(begin)
    assert read_answers(tmp_path / "absent", recipe()) == ([], 0)


def test_other_damage_is_named_by_line(tmp_path):
    path = tmp_path / records.ANSWERS
    line = json.dumps(both("a", [1])) + "\n"
    path.write_text(line[:20] + "\n" + line)
    with pytest.raises(UserError, match=r"answers\.jsonl:1 is damaged"):
        read_answers(path, recipe())
    path.write_text(line + line + "{")
    with pytest.raises(UserError, match=r"answers\.jsonl:2 answers a once more"):
        read_answers(path, recipe())


def test_command_writes_the_figures_it_prints(tmp_path, capsys):
    run = save(tmp_path / "run", recipe(), [both("a", [2, 0, 3], level="1")])
    report.main([str(run)])
    out = capsys.readouterr().out
    assert "MATH-500" in out
    assert f"written: {run}/report.html" in out
    result = json.loads((run / "results.json").read_text())
    assert result["loops"]["orthrus"]["acceptance_length"] == pytest.approx(5 / 3)
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "<ul></ul>" not in page
    assert sorted(p.name for p in run.iterdir()) == [
        *("answers.jsonl", "recipe.json", "report.html", "results.json")
    ]


def test_several_runs_are_compared(tmp_path, capsys):
    rows = [both("a", [2, 0, 3]), both("b", [1])]
    ar = [row(r["id"], r["answers"][:1], {"ar": 1.0}) for r in rows]
    other = [row("a", [answer("orthrus", [2, 0, 3], digest="other")], {"orthrus": 1.0})]
    runs = [
        save(tmp_path / "first", recipe(mode="ar"), ar),
        save(tmp_path / "second", recipe(), rows),
        save(tmp_path / "third", recipe(mode="orthrus"), other),
        save(tmp_path / "sampled", recipe(temperature=1.0), rows),
    ]
    out = tmp_path / "compare.html"
    report.main([*map(str, runs), "--html", str(out)])
    printed = capsys.readouterr().out
    assert printed.count("| MATH-500") == 6
    assert f"same text in {runs[0]} and {runs[1]}: 100.0 % of 2 answers" in printed
    assert f"same text in {runs[0]} and {runs[2]}: 0.0 % of 1 answers" in printed
    assert f"same text in {runs[0]} and {runs[3]}" not in printed
    page = Page()
    page.feed(out.read_text())
    assert page.count["svg"] == 1
    assert all(run.name in out.read_text() for run in runs)


def test_run_without_answers_is_refused_instead_of_a_table_of_zeros(tmp_path):
    run = save(tmp_path / "run", recipe(), [])
    for _ in range(2):
        with pytest.raises(UserError, match=r"holds no answer yet: go on with .* --resume$"):
            report.main([str(run)])
        (run / records.ANSWERS).unlink(missing_ok=True)
    assert sorted(p.name for p in run.iterdir()) == [records.RECIPE]


def test_page_in_a_missing_directory_is_refused_and_not_made(tmp_path):
    run = save(tmp_path / "run", recipe(), [both("a", [1])])
    with pytest.raises(UserError, match=r"^--html .*nope/x\.html: its directory does not exist"):
        report.main([str(run), "--html", str(tmp_path / "nope" / "x.html")])
    assert not (tmp_path / "nope").exists()
    assert not (run / report.RESULTS).exists()


def test_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report.main([str(tmp_path)])
    (tmp_path / records.RECIPE).write_text("{}")
    with pytest.raises(UserError, match=r'json is damaged \(there is no "title"\): .* no run'):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="absent holds no run"):
        report.main([str(tmp_path / "absent")])
