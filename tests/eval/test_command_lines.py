"""Command lines of eval as a person may mistype them, one process each: refused in one line."""

import gzip
import json
import pathlib

import pytest

from eval import records
from tests.support.commands import CommandLine, check_refused
from tests.support.hub_rows import HUB_ROWS
from tests.support.run_files import both, recipe, save

pytestmark = pytest.mark.slow

RUN = "--model {model} --data {math}"  # what a benchmark needs, and what is wrong comes after
MATH = f"eval.math500 {RUN}"
SPEED = "eval.speed --model {model}"
CALIBRATE = "eval.calibrate --model {model} --prompts {prompts}"
LOSSLESS = "eval.lossless --model {model} --prompts {prompts}"
COUNT = "is not a whole number of at least 1"

BENCHMARKS = [
    CommandLine(f"{MATH} --limit 0", f"argument --limit: '0' {COUNT}"),
    CommandLine(f"{MATH} --limit -3", f"argument --limit: '-3' {COUNT}"),
    CommandLine(f"{MATH} --limit 1e3", f"argument --limit: '1e3' {COUNT}"),
    CommandLine(f"{MATH} --batch-size 0", f"argument --batch-size: '0' {COUNT}"),
    CommandLine(f"{MATH} --n 0", f"argument --n: '0' {COUNT}"),
    CommandLine(f"{MATH} --n 2", "n=2 with temperature=0 would give 2 equal answers"),
    CommandLine(f"{MATH} --mode fast", "argument --mode: invalid choice: 'fast'"),
    CommandLine(f"{MATH} --temperature nan", "temperature=nan must be 0 or more"),
    CommandLine(f"{MATH} --temperature hot", "argument --temperature: invalid float value: 'hot'"),
    CommandLine(f"{MATH} --top-p 0", "top_p=0.0 must be above 0"),
    CommandLine(f"{MATH} --top-k 99999999999", "top_k=99999999999 must be 0 (off) or more"),
    CommandLine(f"{MATH} --seed -1", "seed=-1 must be from 0"),
    CommandLine(f"{MATH} --accept always", "argument --accept: invalid choice: 'always'"),
    CommandLine(f"{MATH} --draft-length 1", "draft_length=1 must be from 2 to"),
    CommandLine(f"{MATH} --draft-length 9999", "draft_length=9999 must be from 2 to"),
    CommandLine(f"{MATH} --cycle three-forward", "argument --cycle: invalid choice"),
    CommandLine(f"{MATH} --tree-nodes 6", "--tree-nodes 6 needs --cycle two-forward or one-forw"),
    CommandLine(f"{MATH} --rows 2", "--rows 2: one token per forward is fastest here"),
    CommandLine(f"{MATH} --rows 2 --mode orthrus", "for --mode orthrus choose a --cycle"),
    CommandLine(f"{MATH} --rows 9 --cycle paper", "--cycle paper beside --rows 9"),
    CommandLine(f"{MATH} --rows 9 --mode ar", "--rows 9: decoding one token per forward (ar)"),
    CommandLine(f"{MATH} --mode ar --draft-length 3", "--draft-length 3: decoding one token per"),
    CommandLine(f"{MATH} --max-new-tokens 999999", "--max-new-tokens 999999 leaves no room"),
    CommandLine(f"{MATH}", "--max-new-tokens 2048 leaves no room for a prompt: the model has 2048"),
    CommandLine(f"{MATH} --dtype int8", "argument --dtype: invalid choice: 'int8'"),
    CommandLine(f"{MATH} --mesh rows=2", "--mesh 'rows=2': expected something like data=2"),
    CommandLine(f"{MATH} --out {{file}}/run", "--out {file}/run: {file} is no directory"),
    CommandLine(f"{MATH} --out {{folder}}", "--out {folder} exists: give another one"),
    CommandLine(f"{MATH} --out {{folder}} --resume", "{folder} holds no run"),
    CommandLine(f"{MATH} --out {{damaged}} --resume", "damaged/recipe.json is damaged"),
    CommandLine(f"{MATH} --out {{unanswered}} --resume", "model was None and is now"),
    CommandLine("eval.math500 --model no/such/model --data {math}", "no/such/model cannot be load"),
    CommandLine("eval.math500 --model {folder} --data {math}", "config.json"),
    CommandLine(
        "eval.math500 --model {model} --data absent.jsonl", "--data absent.jsonl cannot be"
    ),
    CommandLine("eval.math500 --model {model} --data {folder}", "--data {folder} cannot be read"),
    CommandLine("eval.math500 --model {model} --data {cut}", "--data {cut} cannot be read"),
    CommandLine("eval.math500 --model {model} --data {binary}", "{binary}:1 is not JSON"),
    CommandLine("eval.math500 --model {model} --data {marked}", "begins with a byte order mark"),
    CommandLine("eval.math500 --model {model} --data {file}", "{file} holds no problem"),
    CommandLine(
        "eval.math500 --model {model} --data {prompts}", "{prompts}:1 is no row of MATH-500"
    ),
    CommandLine(f"eval.gsm8k {RUN}", '{math}:1 is no row of GSM8K: there is no "question"'),
    CommandLine(f"eval.aime {RUN} --year 23", "argument --year: invalid choice: '23'"),
    CommandLine("eval.aime --model {model} --data {prompts}", "is no row of AIME 2025"),
    CommandLine(f"eval.humaneval {RUN}", "give --allow-code-execution to allow that"),
    CommandLine(f"eval.mbpp {RUN}", "give --allow-code-execution to allow that"),
    CommandLine(f"eval.mt_bench {RUN}", "is no row of MT-Bench"),
    CommandLine(f"eval.mt_bench {RUN} --year 24", "unrecognized arguments: --year 24"),
    CommandLine("eval.spec_bench --model {model}", "has no usual copy on the hub: give --data FIL"),
]
REPORT = [
    CommandLine("eval.report", "the following arguments are required: RUN"),
    CommandLine("eval.report absent", "absent holds no run"),
    CommandLine("eval.report {folder}", "{folder} holds no run"),
    CommandLine("eval.report {file}", "{file} holds no run"),
    CommandLine("eval.report {damaged}", "damaged/recipe.json is damaged"),
    CommandLine("eval.report {torn}", "answers.jsonl:1 is damaged"),
    CommandLine("eval.report {unanswered}", "{unanswered} holds no answer yet"),
    CommandLine("eval.report {whole} {unanswered}", "{unanswered} holds no answer yet"),
    CommandLine("eval.report {whole} --html nope/x.html", "--html nope/x.html: its directory does"),
    CommandLine("eval.report {whole} --html {folder}", "--html {folder} is a directory"),
]
MEASUREMENTS = [
    CommandLine("eval.speed", "one of the arguments --model --random-weights is required"),
    CommandLine("eval.speed --random-weights qwen3-999b", "invalid choice: 'qwen3-999b'"),
    CommandLine(f"{SPEED} --random-weights qwen3-4b", "not allowed with argument --model"),
    CommandLine("eval.speed --random-weights qwen3-4b --prompts {prompts}", "--prompts needs --mo"),
    CommandLine("eval.speed --random-weights qwen3-32b --batch-sizes 1000000000", "GB of memory, "),
    CommandLine(f"{SPEED} --repeats 0", f"argument --repeats: '0' {COUNT}"),
    CommandLine(f"{SPEED} --batch-sizes 0", "argument --batch-sizes: '0' is not a list like 1,4"),
    CommandLine(f"{SPEED} --batch-sizes 1,100000000", "lower one of them"),
    CommandLine(f"{SPEED} --contexts 64,x", "argument --contexts: '64,x' is not a list like 1,4,"),
    CommandLine(f"{SPEED} --contexts 9999999", "--contexts 9999999: the model has"),
    CommandLine(f"{SPEED} --modes ar,beam", "--modes names beam: expected some of ar, orthrus"),
    CommandLine(f"{SPEED} --draft-length 99", "draft_length=99 must be from 2 to"),
    CommandLine(f"{SPEED} --tree-nodes 6", "--tree-nodes 6 needs two-forward or one-forward"),
    CommandLine(f"{SPEED} --prompts absent.jsonl", "--prompts absent.jsonl cannot be read"),
    CommandLine(
        f"{SPEED} --prompts {{prompts}} --max-new-tokens 999999", "with max_new_tokens=999999 that"
    ),
    CommandLine(f"{SPEED} --plot no/x.png", "--plot no/x.png: its directory does not exist"),
    CommandLine(f"{SPEED} --plot x.nope", "--plot x.nope: expected a name that ends in ."),
    CommandLine(f"{SPEED} --json {{folder}}", "--json {folder} is a directory"),
    CommandLine("eval.calibrate", "the following arguments are required: --model"),
    CommandLine("eval.calibrate --model {model}", "--prompts FILE.jsonl is needed, except with"),
    CommandLine("eval.calibrate --model Qwen/Qwen3-4B", "--model Qwen/Qwen3-4B is no directory"),
    CommandLine(CALIBRATE, "its diffusion view is untrained: there is no acceptance to measure"),
    CommandLine(f"{CALIBRATE} --limit 0", f"argument --limit: '0' {COUNT}"),
    CommandLine(f"{CALIBRATE} --batches 0", "argument --batches: '0' is not a list like 1,4,16"),
    CommandLine(f"{CALIBRATE} --batches 1,,2", "argument --batches: '1,,2' is not a list like"),
    CommandLine(f"{CALIBRATE} --only everything", "argument --only: invalid choice"),
    CommandLine(f"{CALIBRATE} --only costs --context 9999999", "--context 9999999: the model has"),
    CommandLine(f"{CALIBRATE} --only costs --batches 100000000", "lower one of them"),
    CommandLine(f"{CALIBRATE} --plot x.nope", "--plot x.nope: expected a name that ends in ."),
    CommandLine("eval.calibrate --model {model} --prompts {math}", "is not a JSON object with a"),
]
AUDITS = [
    CommandLine("eval.lossless --model {model}", "arguments are required: --prompts"),
    CommandLine(f"{LOSSLESS} --limit 0", "--limit 0 must be at least 1"),
    CommandLine(f"{LOSSLESS} --seeds 0", "--seeds 0 must be at least 1"),
    CommandLine(f"{LOSSLESS} --parts beam", "--parts names beam: expected some of greedy"),
    CommandLine(f"{LOSSLESS} --temperature 0", "--temperature 0 leaves nothing to sample"),
    CommandLine(f"{LOSSLESS} --near-tie nan", "--near-tie nan must be 0 or more"),
    CommandLine(f"{LOSSLESS} --max-new-tokens 0", "max_new_tokens=0 must be at least 1"),
    CommandLine(f"{LOSSLESS} --batch-size 0", "batch_size=0 must be at least 1"),
    CommandLine(f"{LOSSLESS} --draft-length 1", "draft_length=1 must be from 2 to"),
    CommandLine(f"{LOSSLESS} --cycle two-forward --parts rejection", "audit --parts greedy,coup"),
    CommandLine(
        f"{LOSSLESS} --parts greedy,rejection --max-new-tokens 5", "sampled tokens say nothing of"
    ),
    CommandLine(f"{LOSSLESS} --json no/x.json", "--json no/x.json: its directory does not exist"),
    CommandLine("eval.lossless --model {model} --prompts {file}", "--prompts {file} holds no pr"),
    CommandLine("eval.demo", "runs/demo holds no finished training: run train.main first"),
    CommandLine("eval.demo --prompts 0", f"argument --prompts: '0' {COUNT}"),
    CommandLine("eval.demo --repeats 0", f"argument --repeats: '0' {COUNT}"),
    CommandLine("eval.demo --model {model} --mode ar", "eval.demo compares both loops greedily"),
    CommandLine("eval.demo --model {model} --out {folder}", "--out {folder} exists"),
    CommandLine(
        "eval.demo --model {model} --out new --draft-length 99", "draft_length=99 must be from 2 to"
    ),
]
ACCELERATOR = [
    CommandLine("eval.accelerator", "arguments are required: --out"),
    CommandLine("eval.accelerator --out new --sizes 9b", "--sizes names 9b: expected some of"),
    CommandLine("eval.accelerator --out new --parts all", "--parts names all: expected some of"),
    CommandLine("eval.accelerator --out new --batches 0", "argument --batches: '0' is not a list"),
    CommandLine("eval.accelerator --out new --minutes 0", f"argument --minutes: '0' {COUNT}"),
    CommandLine("eval.accelerator --out {file}/new", "--out {file}/new: {file} is no directory"),
    CommandLine(
        "eval.accelerator --out new", "JAX_PLATFORMS=no", environment={"JAX_PLATFORMS": "no"}
    ),
]
LOAD = "eval.load --server a=http://127.0.0.1:9"  # where nobody listens
KV_CACHE = "eval.kv_cache --model {model} --prompts {prompts}"
SERVING = [
    CommandLine("eval.load --server nonsense", "--server nonsense: expected NAME=URL"),
    CommandLine("eval.load --server a=ftp://x", "--server a=ftp://x: expected NAME=URL"),
    CommandLine(LOAD, "--server a=http://127.0.0.1:9: no models there"),
    CommandLine(f"{LOAD} --concurrency 0", "argument --concurrency: '0' is not a list"),
    CommandLine(f"{LOAD} --requests 0", f"argument --requests: '0' {COUNT}"),
    CommandLine(f"{KV_CACHE} --tokens 0", f"argument --tokens: '0' {COUNT}"),
    CommandLine("eval.kv_cache --model {model} --prompts none", "--prompts none cannot be read"),
]
LINES = [*BENCHMARKS, *REPORT, *MEASUREMENTS, *AUDITS, *ACCELERATOR, *SERVING]


@pytest.fixture(scope="module")
def places(tiny_base, tmp_path_factory) -> dict[str, pathlib.Path]:
    """Files and directories, whole and damaged, by the names that the command lines give them."""
    home = tmp_path_factory.mktemp("places")
    folder = home / "folder"
    folder.mkdir()
    (folder / "something").write_text("else")
    math = json.dumps(HUB_ROWS["math500"]).encode() + b"\n"
    many = "".join(json.dumps(HUB_ROWS["math500"] | {"unique_id": i}) + "\n" for i in range(50))
    contents = {
        "math": math,
        "prompts": b'{"prompt": "What are 12 and 30?"}\n{"prompt": "Why?"}\n',
        "file": b"",
        "binary": b"\xff\xfe\x00",
        "marked": b"\xef\xbb\xbf" + math,
        "cut.gz": gzip.compress(many.encode())[:-20],
    }
    for name, content in contents.items():
        (home / name).write_bytes(content)
    runs = {
        "whole": save(home / "whole", recipe(), [both("a", [1])]),
        "unanswered": save(home / "unanswered", recipe(), []),
        "damaged": save(home / "damaged", {"title": "MATH-500"}, []),
        "torn": save(home / "torn", recipe(), [both("a", [1]), both("b", [1])]),
    }
    answers = runs["torn"] / records.ANSWERS
    answers.write_bytes(answers.read_bytes()[5:])
    files = {name.removesuffix(".gz"): home / name for name in contents}
    return {"model": tiny_base, "folder": folder, **files, **runs}


def test_table_has_no_duplicates():
    assert len({str(line) for line in LINES}) == len(LINES) >= 100


@pytest.mark.parametrize("line", LINES, ids=str)
def test_command_line_is_refused_in_one_line(line, places, tmp_path):
    check_refused(line, tmp_path, places)


def test_every_command_is_in_the_table():
    folder, entry = pathlib.Path(records.__file__).parent, '\nif __name__ == "__main__":'
    commands = {f"eval.{x.stem}" for x in folder.glob("*.py") if entry in x.read_text()}
    served = {"eval.grading_worker"}  # started by another process, not by a person
    assert {str(line).split()[0] for line in LINES} == commands - served
