"""Command lines of train/ that are refused: one line, status 2, nothing loaded, nothing left."""

import json
import pathlib

import pytest

from tests.support.commands import CommandLine, check_refused
from tests.support.training import miniature
from train import pretrain

pytestmark = pytest.mark.slow

CONFIG = """
import pathlib
from tests.support.training import miniature

def get_config():
    config = miniature(pathlib.Path("run"))
    config.base = "BASE"
    CHANGE
    return config
"""
ROW = {"question": "What are 2 and 2?", "answer": "4"}
ENTRY = '\nif __name__ == "__main__":'


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, configuration files good and bad, and files of prompts."""
    folder = tmp_path_factory.mktemp("places")
    config = miniature(folder)
    pretrain.main(config, overwrite=False)
    whole = lambda change="pass": CONFIG.replace("BASE", config.base).replace("CHANGE", change)
    texts = {
        "config.py": whole(),
        "typo.py": whole("config.train.lerning_rate = 1e-3"),
        "raises.py": whole("config.train.update(stepz=1); config.no.such = 1"),
        "syntax.py": "def get_config(:\n",
        "exits.py": "import sys\nsys.exit(0)\n",
        "none.py": "def get_config():\n    pass\n",
        "plain.py": "x = 1\n",
        "config.yaml": "train:\n  steps: 100\n",
        "empty.jsonl": "",
        "unanswered.jsonl": json.dumps({"question": "What are 2 and 2?"}) + "\n",
        "few.jsonl": json.dumps(ROW) + "\n",
        "used/notes.txt": "mine",
        "benched/step.json": "{}",
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "latin.jsonl").write_bytes(b'{"question": "caf\xe9?", "answer": "1"}\n' * 3)
    (folder / "bare").mkdir()
    return {"at": folder, "base": config.base, "config": folder / "config.py"}


def lines(command, *cases, **options):
    """Command lines of one command with the miniature's configuration."""
    return [
        CommandLine(f"train.{command} --config {{config}} {flags}", says, **options)
        for flags, says in cases
    ]


FILES = [
    CommandLine(f"train.main --config{equals}", says)
    for equals, says in (
        ("=missing.py", "No such file or directory"),
        ("=", "--config '' cannot be read"),
        ("={at}", "Is a directory"),
        (" {at}/config.yaml", "config.yaml"),
        (" {at}/plain.py", "defines no get_config(): it must be a Python file"),
        (" {at}/none.py", "returns a NoneType: expected a ConfigDict"),
        (" {at}/syntax.py", "syntax.py:1 is no Python file that defines a configuration"),
        (" {at}/raises.py", "raises.py:8"),
        (" {at}/exits.py", "exits.py:2"),
        (" {at}/typo.py", "the configuration's train has no lerning_rate"),
    )
]
FLAGS = lines(
    "main",
    ("--config.train.lerning_rate=1", "no key 'lerning_rate': did you mean 'learning_rate'?"),
    ("--config.nope=3", "the configuration has no key 'nope'"),
    ("--config.train.steps=many", "invalid literal for int() with base 10: 'many'"),
    ("--config.train.learning_rate=fast", "--config.train.learning_rate=fast"),
    ("--config.train.document_masks=maybe", "--config.train.document_masks=maybe"),
    ("--config.run", "Missing value for flag --config.run"),
    ("--bogus", "Unknown command line flag 'bogus'"),
    ("stray", "unexpected argument 'stray'"),
    ("--compile_cache={config}", "cannot be written"),
)
VALUES = lines(
    "main",
    ("--config.run=", "config.run is empty"),
    ("--config.seed=-1", "config.seed=-1 must be 0 or more"),
    ("--config.seed=4294967295", "config.seed=4294967295 must be at most 4294967292"),
    ("--config.train.seed=-1", "config.train.seed=-1 must be 0 or more"),
    ("--config.train.steps=0", "config.train.steps=0 must be at least 2"),
    ("--config.train.steps=-3", "config.train.steps=-3 must be at least 2"),
    ("--config.train.steps=1", "config.train.steps=1 must be at least 2"),
    ("--config.train.steps=9999999999", "must be at most 2147483647"),
    ("--config.train.batch_size=0", "config.train.batch_size=0 must be at least 1"),
    ("--config.train.accumulate=3", "does not divide into train.accumulate=3 micro-batches"),
    ("--config.train.save_every=0", "config.train.save_every=0 must be at least 1"),
    ("--config.train.eval_every=0", "config.train.eval_every=0 must be at least 1"),
    ("--config.train.log_every=0", "config.train.log_every=0 must be at least 1"),
    ("--config.train.keep=0", "config.train.keep=0 must be at least 1"),
    ("--config.train.eval_prompts=-1", "config.train.eval_prompts=-1 must be 0 or more"),
    ("--config.train.row_length=8", "config.train.anchors=6 must be at most 2"),
    ("--config.train.row_length=4096", "is over the 2048 positions of"),
    ("--config.train.block_size=1", "config.train.block_size=1 must be at least 2"),
    ("--config.train.block_size=999", "must be below config.train.row_length=256"),
    ("--config.train.anchors=0", "config.train.anchors=0 must be at least 1"),
    ("--config.train.anchors=251", "config.train.anchors=251 must be at most 250"),
    ("--config.train.learning_rate=0", "config.train.learning_rate=0.0 must be above 0"),
    ("--config.train.learning_rate=nan", "config.train.learning_rate=nan must be above 0"),
    ("--config.train.warmup=1", "config.train.warmup=1.0 must be from 0 to below 1"),
    ("--config.train.warmup=0.99", "leaves no step after the warm-up"),
    ("--config.train.gamma=-1", "config.train.gamma=-1.0 must be 0 or more"),
    ("--config.train.divergence=l2", "config.train.divergence='l2' is not one of kl, tv, ce"),
    ("--config.train.remat=some", "config.train.remat='some' is not one of"),
    ("--config.train.dtype=float8", "config.train.dtype='float8' is not one of"),
    ("--config.mesh.data=3", "mesh data=3, fsdp=-1, tensor=1 does not fit 1 devices"),
    ("--config.distill.prompts=0", "distill.prompts=0 must be at least 1"),
    ("--config.distill.mode=fast", "distill.mode='fast' is not one of ar, orthrus"),
    ("--config.distill.dtype=int8", "distill.dtype='int8' is not one of"),
    ("--config.distill.temperature=-1", "temperature=-1.0 must be"),
    ("--config.distill.max_new_tokens=0", "distill.max_new_tokens=0 must be from 1 to 2048"),
    ("--config.distill.max_new_tokens=2048", "leaves no room for a prompt in the model's 2048"),
)
PLACES = lines(
    "main",
    ("--config.base=nowhere", "nowhere cannot be loaded"),
    ("--config.base={at}/bare", "config.json does not exist"),
    ("--config.base={config}", "config.py cannot be loaded"),
    ("--config.run={config}", "config.py cannot be written"),
    ("--config.run=/proc/run", "/proc/run cannot be written"),
    ("--config.responses=nowhere", "nowhere is not there"),
    ("--config.responses={at}/empty.jsonl", "there is no conversation to pack"),
    ("--config.distill.sources=problems", "must be pairs (source, weight)"),
    ("--config.train.eval_sources=(('none.jsonl',1),)", "none.jsonl is not there"),
    ("--config.train.eval_sources=(('{at}/few.jsonl',1),)", "of the 4 requested"),
    ("--config.distill.sources=(('{at}/few.jsonl',1),)", "of the 24 requested"),
)
MACHINES = [
    *lines("main", ("", "JAX_PLATFORMS=abacus"), environment={"JAX_PLATFORMS": "abacus"}),
    *lines("main", ("", "JAX_ENABLE_X64 is set"), environment={"JAX_ENABLE_X64": "1"}),
    *lines("pretrain", ("", "JAX_ENABLE_X64 is set"), environment={"JAX_ENABLE_X64": "1"}),
    *lines("distill", ("", "JAX_PLATFORMS=abacus"), environment={"JAX_PLATFORMS": "abacus"}),
]
DISTILL = lines(
    "distill",
    ("--config.distill.shard_size=0", "distill.shard_size=0 must be at least 1"),
    ("--config.distill.tensor=2", "tensor=2"),
    ("--config.distill.max_prompt_tokens=2", "has 0 prompts of the 24 requested"),
    ("--config.distill.sources=(('problems?split=test',1),)", "a split that is none of train"),
    ("--config.distill.sources=(('problems',-1),)", "weights above 0"),
    ("--config.base=nowhere", "nowhere cannot be loaded"),
    ("--config.run={config}", "config.py cannot be written"),
)
PRETRAIN = lines(
    "pretrain",
    ("", "base is not empty"),
    ("--config.base=/proc/base", "config.base=/proc/base cannot be written"),
    ("--config.base={config}", "config.py is a file"),
    ("--config.base={at}/used --overwrite", "holds no checkpoint"),
    ("--config.base=new --config.pretrain.steps=0", "config.pretrain.steps=0 must be at least 2"),
    ("--config.base=new --config.pretrain.batch_size=0", "must be at least 1"),
    ("--config.base=new --config.pretrain.row_length=4096", "must be at most 2048"),
    ("--config.base=new --config.pretrain.warmup=1", "must be from 0 to below 1"),
    ("--config.base=new --config.pretrain.learning_rate=-1", "must be above 0"),
    ("--config.base=new --config.pretrain.significant_bits=99", "must be at most 24"),
    ("--config.base=new --config.model.vocab_size=100", "vocab_size=100 must be at least 260"),
    (
        "--config.base=new --config.model.num_key_value_heads=0",
        "=0: expected a whole number from 1",
    ),
    ("--config.base=new --config.pretrain.data=none.jsonl", "none.jsonl is not there"),
    ("--config.base=new --config.pretrain.data={at}/latin.jsonl", "(3 not UTF-8)"),
    ("--config.base=new --config.pretrain.data={at}/unanswered.jsonl", "(1 no answer)"),
    ("--config.base=new --config.pretrain.data={at}/empty.jsonl", "(it is empty)"),
)
BENCH = lines(
    "bench",
    ("--config.train.batch_size=0", "config.train.batch_size=0 must be at least 1"),
    ("--config.train.anchors=999", "config.train.anchors=999 must be at most 250"),
    ("--config.train.steps=1", "config.train.steps=1 must be at least 2"),
    ("--config.run={config}", "config.py cannot be written"),
    ("--config.run={at}/benched", "step.json exists"),
    ("--config.model.hidden_size=90000000 --config.model.num_hidden_layers=99", "GB are free"),
)
AOT = lines(
    "aot",
    ("", "--topology KIND:SHAPE is required"),
    ("--topology=v5e:1x1 --largest=context", "--largest context: the only choice is batch"),
    ("--topology=v5e:1x1", "is not of qwen3-0.6b"),
    ("--topology=v5e:1x1 --config.train.block_size=999", "must be below config.train.row_length"),
    ("--topology=v5e:1x1 --text=/proc/step.txt", "--text=/proc/step.txt cannot be written"),
)
HEAD = lines(
    "head",
    ("", "run holds no finished training: run train.main first"),
    ("--config.head.steps=0", "config.head.steps=0 trains no head: give more"),
    ("--config.head.rank=0", "config.head.rank=0 must be at least 1"),
    ("--config.head.kind=pair", "config.head.kind='pair' is not one of table, map"),
    ("--config.head.learning_rate=nan", "config.head.learning_rate=nan must be above 0"),
    ("--overwrite", "Unknown command line flag 'overwrite'"),
)
SMOLLM2 = [
    CommandLine(f"train.{command}", says)
    for command, says in (
        ("smollm2", "arguments are required: --to"),
        ("smollm2 --to {at}/used", "is not empty: name another directory"),
        ("smollm2 --to {config}", "is a file: expected a directory"),
        ("smollm2_prompts --gsm8k none.jsonl --out new", "none.jsonl cannot be read: No such file"),
        ("smollm2_prompts --gsm8k {at}/few.jsonl --out new", "has 1 rows, expected over 473"),
        ("smollm2_prompts --gsm8k {at}/latin.jsonl --out new", "latin.jsonl:1 is not JSON"),
        ("smollm2_prompts --own many", "argument --own: invalid int value: 'many'"),
    )
]
TABLE = [*FILES, *FLAGS, *VALUES, *PLACES, *MACHINES, *DISTILL, *PRETRAIN, *BENCH, *AOT, *HEAD]
TABLE += SMOLLM2


@pytest.mark.parametrize("line", TABLE, ids=str)
def test_command_line_is_refused_in_one_line(line, places, tmp_path):
    check_refused(line, tmp_path, places)


def test_every_command_is_in_the_table():
    folder = pathlib.Path(pretrain.__file__).parent
    commands = {f"train.{x.stem}" for x in folder.glob("*.py") if ENTRY in x.read_text()}
    assert {str(line).split()[0] for line in TABLE} == commands
