"""The gate for a configuration's values: every type that a file may give, one line per refusal."""

import importlib
import json
import re

import pytest
from ml_collections import ConfigDict

from configs import paper
from orthrus_jax.errors import UserError
from tests.support.training import miniature
from train import settings
from train.distill_config import DistillConfig

PARTS = ("run", "base", "seed", "responses", "distributed", "mesh", "train")
NAMES = ("qwen3_0_6b", "qwen3_1_7b", "qwen3_4b", "qwen3_8b", "small", "tiny")


def with_value(tmp_path, name, value):
    """The miniature with one value, of any type, as a file's own code may set it."""
    config = miniature(tmp_path)
    part, _, key = name.rpartition(".")
    with config.unlocked(), config.ignore_type():
        (config[part] if part else config)[key] = value
    return config


def check_all(config):
    settings.check(config, *PARTS)
    settings.check(config, "pretrain")
    DistillConfig.of(config)


@pytest.mark.parametrize("name", NAMES)
def test_configurations_of_the_checkout_are_accepted(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    settings.check(config, *PARTS)
    DistillConfig.of(config)
    if "pretrain" in config:
        settings.check(config, "pretrain")


def test_every_value_of_the_recipe_is_checked():
    """A new value in configs/paper.py needs a row in the table."""
    recipe = paper.recipe()
    tables = (settings.WHOLE, settings.REAL, settings.SWITCHES, settings.TEXTS, settings.CHOICES)
    known = {name for table in (*tables, settings.OTHERS) for name in table}
    for part in ("train", "mesh"):
        assert {f"{part}.{key}" for key in recipe[part]} <= known
    assert {key for key in recipe if not isinstance(recipe[key], ConfigDict)} <= known


@pytest.mark.parametrize("value", ["many", 2.5, True, None, 10**30, [1], float("nan")])
@pytest.mark.parametrize("name", ["seed", "train.steps", "train.save_every", "distill.prompts"])
def test_what_is_no_whole_number_is_refused(tmp_path, name, value):
    with pytest.raises(UserError, match=re.escape(f"{name}=")) as refusal:
        check_all(with_value(tmp_path, name, value))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", ["fast", None, float("inf"), float("nan"), -1.0])
@pytest.mark.parametrize("name", ["train.learning_rate", "train.warmup", "train.gamma"])
def test_what_is_no_number_in_its_range_is_refused(tmp_path, name, value):
    with pytest.raises(UserError, match=re.escape(f"config.{name}=")):
        check_all(with_value(tmp_path, name, value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train.document_masks", "no"),
        ("distributed", 1),
        ("distill.thinking", "no"),
        ("run", 5),
        ("base", ""),
        ("run", "a\0b"),
        ("train.dtype", None),
        ("train.divergence", ["kl"]),
        ("distill.mode", {}),
        ("distill.sources", "problems"),
        ("distill.sources", (("problems", "much"),)),
        ("distill.sources", ((5, 1.0),)),
        ("distill.sources", (("problems", float("nan")),)),
        ("train", 5),
        ("mesh", "all"),
        ("distill", 5),
    ],
)
def test_value_of_another_type_is_refused(tmp_path, name, value):
    with pytest.raises(UserError) as refusal:
        check_all(with_value(tmp_path, name, value))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["train.keep", "mesh.fsdp", "run", "train", "distill", "seed"])
def test_missing_value_is_named(tmp_path, name):
    config = miniature(tmp_path)
    part, _, key = name.rpartition(".")
    with config.unlocked():
        del (config[part] if part else config)[key]
    with pytest.raises(UserError, match=key):
        check_all(config)


def test_unknown_value_is_named_with_those_that_exist(tmp_path):
    with pytest.raises(UserError, match=r"train has no lerning_rate; known: .*learning_rate"):
        check_all(with_value(tmp_path, "train.lerning_rate", 1.0))


def test_refusals_leave_the_configuration_as_it_was(tmp_path):
    config = with_value(tmp_path, "train.steps", 0)
    before = json.loads(config.to_json_best_effort())
    with pytest.raises(UserError):
        check_all(config)
    assert json.loads(config.to_json_best_effort()) == before
