"""What --mesh and the other options of the runtime take."""

import argparse

import jax
import pytest

from orthrus_jax import cli
from orthrus_jax.errors import UserError


def test_mesh_is_parsed_as_written():
    assert cli.parse_mesh(None) is None
    assert dict(cli.parse_mesh("data=-1").shape) == {
        "data": jax.device_count(),
        "fsdp": 1,
        "tensor": 1,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4", "expected something like data=2,tensor=4"),
        ("data=x", "expected something like data=2,tensor=4"),
        ("fsdp=2", "expected something like data=2,tensor=4"),
        ("data=3,tensor=5", "is of 15 devices, and there are|does not fit"),
    ],
)
def test_impossible_mesh_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        cli.parse_mesh(text)


def test_runtime_options_are_those_of_load(monkeypatch):
    kept = []
    monkeypatch.setattr(cli, "enable_compilation_cache", kept.append)
    parser = argparse.ArgumentParser()
    cli.add_runtime(parser)
    told = cli.runtime_options(parser.parse_args(["--dtype", "float32", "--compile-cache", "off"]))
    assert told == {"view": None, "dtype": "float32", "mesh": None}
    assert kept == ["off"]


def test_both_spellings_of_the_cache_flag_are_taken():
    parser = argparse.ArgumentParser()
    cli.add_compile_cache(parser)
    for flag in ("--compile-cache", "--compile_cache"):
        assert parser.parse_args([flag, "off"]).compile_cache == "off"


def test_kv_cache_goes_to_load_where_a_command_has_the_flag(monkeypatch):
    monkeypatch.setattr(cli, "check_devices", lambda: None)
    monkeypatch.setattr(cli, "enable_compilation_cache", lambda _: None)
    parser = argparse.ArgumentParser()
    cli.add_runtime(parser)
    cli.add_kv_cache(parser)
    assert cli.runtime_options(parser.parse_args([]))["kv_cache"] == "bf16"
    assert cli.runtime_options(parser.parse_args(["--kv-cache", "k4v2"]))["kv_cache"] == "k4v2"
    with pytest.raises(SystemExit):
        parser.parse_args(["--kv-cache", "int8"])
