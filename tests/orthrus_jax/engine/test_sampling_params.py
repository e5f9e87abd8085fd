"""SamplingParams refuses every value that it cannot sample with, by name and limit."""

import pytest

from orthrus_jax.engine import SamplingParams
from orthrus_jax.errors import UserError

REFUSED = {
    "temperature": [(-0.1, "0 or more"), (float("nan"), "0 or more"), (float("inf"), "0 or more")],
    "top_k": [(-1, "0 (off) or more")],
    "top_p": [(0.0, "above 0 and at most 1 (off)"), (1.01, "above 0 and at most 1 (off)")],
    "min_p": [(-0.1, "from 0 (off) to below 1"), (1.0, "from 0 (off) to below 1")],
    "seed": [(-1, "from 0 to 4294967295"), (2**32, "from 0 to 4294967295")],
    "max_new_tokens": [(0, "at least 1")],
    "min_new_tokens": [(-1, "from 0 to max_new_tokens=256"), (257, "from 0 to max_new_tokens=256")],
    "stop": [("end", "a sequence of strings, none empty"), (("",), "a sequence of strings")],
    "stop_token_ids": [((3, -1), "ids of 0 or more")],
    "n": [(0, "at least 1")],
}


@pytest.mark.parametrize(
    ("name", "value", "limit"), [(n, v, m) for n, values in REFUSED.items() for v, m in values]
)
def test_impossible_value_is_refused_by_name_and_limit(name, value, limit) -> None:
    with pytest.raises(UserError) as refusal:
        SamplingParams(**{name: value})
    assert str(refusal.value).startswith(f"{name}={value!r} must be {limit}")


def test_several_samples_need_a_temperature() -> None:
    with pytest.raises(UserError, match="n=3 with temperature=0 would give 3 equal answers"):
        SamplingParams(n=3)
    assert SamplingParams(n=3, temperature=0.5).n == 3


def test_limits_themselves_are_allowed() -> None:
    params = SamplingParams(
        temperature=0.0, top_p=1.0, min_p=0.0, seed=2**32 - 1, max_new_tokens=1, min_new_tokens=1
    )
    assert not params.filtered
    assert all(SamplingParams(**f).filtered for f in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}))
