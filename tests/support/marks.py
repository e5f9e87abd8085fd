"""Marks of parameters."""

import pytest


def slow(*values) -> list:
    """Parameters of a test that only the slow suite tries."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
