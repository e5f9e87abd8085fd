"""After each test of the sandbox, no process and no directory of it remains."""

import time

import pytest

from tests.support.sandbox import own_folders, own_processes, require


@pytest.fixture
def namespaces():
    require("namespaces")


@pytest.fixture(autouse=True)
def nothing_remains():
    before = set(own_folders())
    yield
    assert set(own_folders()) <= before
    end = time.monotonic() + 5
    while own_processes() and time.monotonic() < end:  # the last ones are being reaped
        time.sleep(0.05)
    assert not own_processes()
