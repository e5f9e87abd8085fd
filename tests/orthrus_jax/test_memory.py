"""Memory is refused in one line before it is taken."""

import types

import jax
import pytest

from orthrus_jax import memory
from orthrus_jax.checkpoint import load_checkpoint, save_checkpoint
from orthrus_jax.errors import UserError
from orthrus_jax.model import Model, params
from tests.support.configs import tiny_config
from tests.support.weights import random_params


def device(limit: int | None, used: int = 0) -> types.SimpleNamespace:
    account = None if limit is None else {"bytes_limit": limit, "bytes_in_use": used}
    return types.SimpleNamespace(memory_stats=lambda: account, process_index=0)


def test_weights_are_counted_with_both_views():
    config = tiny_config()
    leaves = jax.tree.leaves(random_params(config, 0))
    assert memory.weight_bytes(config) == sum(leaf.nbytes for leaf in leaves)


def test_decoding_needs_its_cache_and_its_largest_forward():
    config = tiny_config()
    cache = Model(config).init_cache(3, 128)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    needed = memory.decoding_bytes(Model(config), 3, 128, 7)
    assert needed == held + 3 * 7 * (4 * config.vocab_size + 7)


def test_memory_that_is_free_is_not_refused():
    memory.check_memory(100, "x", "y", [device(300, 200)])
    memory.check_memory(200, "x", "y", [device(300, 200), device(300, 200)])
    memory.check_memory(1 << 20, "x", "y")


def test_refusal_names_need_room_and_remedy():
    with pytest.raises(UserError) as raised:
        memory.check_memory(50 * 10**9, "--rows 9", "give fewer", [device(24 * 10**9, 4 * 10**9)])
    assert str(raised.value) == ("--rows 9 needs about 50 GB of memory, 20 GB are free: give fewer")
    with pytest.raises(UserError, match=r"1e\+06 GB of memory, .* GB are free"):
        memory.check_memory(10**15, "this", "take less")


def test_machine_answers_for_devices_without_an_account(monkeypatch):
    monkeypatch.setattr(memory, "_available", lambda: 70)
    monkeypatch.setattr(memory, "_of_container", lambda: None)
    assert memory.free_bytes([device(None)] * 8) == 70, "they share it"
    monkeypatch.setattr(memory, "_of_container", lambda: 50)
    assert memory.free_bytes([device(None)]) == 50
    monkeypatch.setattr(memory, "_available", lambda: None)
    monkeypatch.setattr(memory, "_of_container", lambda: None)
    assert memory.free_bytes([device(None)]) is None
    memory.check_memory(10**15, "x", "y", [device(None)])


def test_limit_of_a_container_is_read(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory._of_container() is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 300\n")
    assert memory._of_container() == 400
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_container() is None


def test_each_host_has_room_for_its_part():
    elsewhere = device(None)
    elsewhere.process_index = 1
    memory.check_memory(200, "x", "y", [device(100), elsewhere])
    with pytest.raises(UserError):
        memory.check_memory(202, "x", "y", [device(100), elsewhere])


def test_checkpoint_that_does_not_fit_is_refused_before_it_is_read(monkeypatch, tmp_path):
    config = tiny_config()
    save_checkpoint(tmp_path / "x", config, random_params(config, 0))
    monkeypatch.setattr(memory, "_machine_bytes", lambda: memory.weight_bytes(config))
    load_checkpoint(tmp_path / "x")
    monkeypatch.setattr(memory, "_machine_bytes", lambda: memory.weight_bytes(config) - 1)
    monkeypatch.setattr("orthrus_jax.checkpoint.reader.to_device", lambda *_: 1 / 0)
    with pytest.raises(UserError, match=f"loading {tmp_path}/x needs about .* GB of memory"):
        load_checkpoint(tmp_path / "x")


def test_base_model_needs_room_for_its_copied_attention_too(monkeypatch, tmp_path):
    config = tiny_config()
    base, _ = params.split(random_params(config, 0))
    save_checkpoint(tmp_path / "x", config, base)
    monkeypatch.setattr(memory, "_machine_bytes", lambda: memory.weight_bytes(config))
    load_checkpoint(tmp_path / "x")
    monkeypatch.setattr(memory, "_machine_bytes", lambda: memory.weight_bytes(config) - 1)
    with pytest.raises(UserError, match="needs about"):
        load_checkpoint(tmp_path / "x")
