"""Run by test_sharding.py in a process of its own, which has eight (fake) devices.

Prints one JSON object: what the model in the directory says, in the ways asked for, on the meshes
named, and where its weights lie: `python -m tests.support.programs.serve_on_8 DIR WAY,WAY MESH...`.
"""

import json
import os
import sys

from tests.support import fast_compile

os.environ["XLA_FLAGS"] = fast_compile.on_devices(8)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

import orthrus_jax
from orthrus_jax import KVCacheConfig, sharding
from orthrus_jax.decoding import Strategy
from orthrus_jax.engine import Plan, Request, SamplingParams, Session

WAYS = {
    "ar": {"strategy": "ar"},
    "orthrus": {},
    "a tree ahead": {"strategy": Strategy("orthrus-1f", tree_nodes=6, early_blocks=2)},
    "coupled": {"temperature": 0.8, "top_k": 9, "seed": 3, "strategy": Strategy(accept="coupled")},
    "quantised": {"strategy": Strategy("orthrus-2f", tree_nodes=6)},
    "rejection": {"temperature": 0.8, "seed": 3},
}


RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, 60, n).tolist() for n in (3, 40, 7, 9, 1, 5, 12, 2, 30)]


def answers(model, way):
    """More prompts than rows, so that finished rows are refilled; or a dialogue in three turns."""
    if way != "dialogue":
        found = model.complete(PROMPTS, batch_size=4, max_new_tokens=12, **WAYS[way])
        return [completion.tokens for completion in found]
    session, said = Session(slots=192), []
    for prompt in PROMPTS[1:4]:
        request = Request([*said, *prompt], SamplingParams(max_new_tokens=8))
        (end,) = [e for e in model.engine.serve([request], Plan(), session) if e.completion]
        said = [*request.prompt, *end.completion.tokens]
    return said


def main(directory, ways, *meshes):
    found = {}
    for name in meshes:
        mesh = None if name == "one" else sharding.make_mesh(*map(int, name.split(" x ")))
        model = orthrus_jax.load(directory, mesh=mesh)
        q = model.params["layers_0"]["self_attn"]["q_proj"]["weight"]
        pieces = {tuple(shard.data.shape) for shard in q.addressable_shards}
        found[name] = {}
        for way in ways.split(","):
            if way == "quantised":  # in tiles of 8 tokens
                model = orthrus_jax.load(directory, mesh=mesh, kv_cache=KVCacheConfig(4, 2, tile=8))
            found[name][way] = answers(model, way)
        found[name] |= {"pieces": sorted(pieces), "shape": q.shape}
    assert jax.device_count() == 8
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
