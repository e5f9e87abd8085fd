"""The models that the tests of the engine share."""

import dataclasses

import pytest

from orthrus_jax.llm import LLM
from tests.support.engine import hashing, tokenizer
from tests.support.fake_models.hashed import CONFIG
from tests.support.weights import random_params

REAL = dataclasses.replace(  # with tied embeddings it would repeat itself
    CONFIG, num_hidden_layers=1, tie_word_embeddings=False
)


@pytest.fixture
def model() -> LLM:
    return hashing()


@pytest.fixture(scope="module")
def real() -> LLM:
    return LLM(REAL, random_params(REAL, 0, gain=2.5), tokenizer())
