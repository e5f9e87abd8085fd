"""What fits with each kind of cache: the table of `aot --program memory`, and aot's --kv-cache."""

import json

import jax
import pytest

from orthrus_jax import aot, sharding
from orthrus_jax.aot import command, room
from orthrus_jax.attention import KVCacheConfig
from orthrus_jax.attention.kv_config import NAMES
from orthrus_jax.config import PRESETS
from orthrus_jax.model import Model
from tests.support.configs import tiny_config


@pytest.fixture(autouse=True)
def described(monkeypatch) -> None:
    monkeypatch.setattr(command, "devices_of", lambda _: jax.devices()[:1])


def test_table_holds_what_fits_and_one_more_does_not(capsys) -> None:
    sizes = ["--preset", "qwen3-0.6b", "--topology", "v5e:1x1", "--batch", "4", "--context", "8192"]
    aot.main([*sizes, "--program", "memory", "--json"])
    table = json.loads(capsys.readouterr().out)["by_cache"]
    assert list(table) == list(NAMES)
    config, mesh = PRESETS["qwen3-0.6b"], sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    free = aot.CHIPS["v5e"].gib * 2**30 - aot.programs.local_bytes(aot.weights(config, mesh))
    for name, row in table.items():
        kind = None if name == "bf16" else name
        model = Model(config, mesh, kv_cache=room.kv_cache_of(kind))
        assert not room._exceeds(model, free, row["batch"], 8192)
        assert room._exceeds(model, free, row["batch"] + 1, 8192)
        assert not room._exceeds(model, free, 4, row["context"])
    context = [table[name]["context"] for name in NAMES]
    batch = [table[name]["batch"] for name in NAMES]
    assert context == sorted(context)
    assert batch == sorted(set(batch))
    aot.main([*sizes, "--program", "memory"])
    assert f"k4v2: longest context {table['k4v2']['context']:6d}" in capsys.readouterr().out


def test_quantised_loop_is_compiled_and_its_cache_counted() -> None:
    config, kv_cache = tiny_config(), KVCacheConfig(4, 2, tile=8)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    program = aot.lower_decoding("ar", config, mesh, batch=2, context=64, kv_cache=kv_cache)
    result = aot.compile_report(program, aot.CHIPS["v5e"])
    assert result["fits"]
    assert result["cache_gib"] * 2**30 == room.cache_bytes(
        Model(config, mesh, kv_cache=kv_cache), 2, 64
    )
    assert result["results_gib"] * 2**30 < 2048  # donated
