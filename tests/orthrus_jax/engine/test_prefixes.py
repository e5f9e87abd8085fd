"""Which row a request takes and what it keeps: pure Python on ids."""

import numpy as np
import pytest

from orthrus_jax.engine.prefixes import Placement, place, shared_length


@pytest.mark.parametrize("seed", range(5))
def test_shared_length_equals_the_count_one_by_one(seed) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(200):
        held = rng.integers(0, 3, rng.integers(0, 12)).tolist()
        prompt = rng.integers(0, 3, rng.integers(1, 12)).tolist()
        if rng.random() < 0.5:
            prompt = [*held[: rng.integers(0, 12)], *prompt]
        limit = min(len(held), len(prompt) - 1)
        expected = next((i for i in range(limit) if held[i] != prompt[i]), limit)
        assert shared_length(held, prompt) == expected


def test_row_whose_ids_all_begin_the_prompt_is_continued() -> None:
    held = [[1, 2, 3, 4, 5], [1, 2, 3], [7]]
    assert place([1, 2, 3, 9], held, [0, 1, 2], [0, 1, 2]) == Placement(1, 1, 3)


def test_row_of_another_continuation_is_copied_to_the_least_recently_used() -> None:
    held = [[1, 2, 3, 4, 5], [6], [7]]
    assert place([1, 2, 3, 9], held, [0, 2, 1], [0, 1, 2]) == Placement(0, 0, 3)
    assert place([1, 2, 3, 9], held, [5, 2, 1], [0, 1, 2]) == Placement(2, 0, 3)


def test_running_row_is_copied_and_never_taken() -> None:
    held = [[1, 2, 3], [6], [7]]
    assert place([1, 2, 3, 9], held, [0, 2, 1], [1, 2]) == Placement(2, 0, 3)


def test_empty_rows_are_taken_before_rows_that_hold_something() -> None:
    held = [[1, 2, 3], [], [7, 8]]
    assert place([5, 6], held, [3, -1, 2], [0, 1, 2]).target == 1
    assert place([5, 6], held, [3, -1, 2], [0, 2]).target == 2
    assert place([5, 6], held, [3, -1, 2], [0, 2]).kept == 0
