"""One server over HashModel for the tests of a file; without the extras none is collected."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

NEEDED = ("starlette", "uvicorn", "prometheus_client", "httpx", "llguidance", "openai")
COMPLETE = all(importlib.util.find_spec(name) for name in NEEDED)
collect_ignore_glob = [] if COMPLETE else ["test_*.py"]


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    from tests.support.engine import hashing
    from tests.support.server import running

    with running(hashing()) as one:
        yield one
