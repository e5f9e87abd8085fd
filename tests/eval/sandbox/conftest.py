"""After each test of the sandbox, no process and no directory of it remains.

Workers test at the same time: each file's processes and directories have a place of their own.
"""

import tempfile
import time

import pytest

from eval import sandbox
from tests.support.sandbox import own_folders, own_processes


@pytest.fixture(scope="module", autouse=True)
def own_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sandbox")
    (folder / "confined").symlink_to(sandbox.START.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "START", folder / "confined" / sandbox.START.name)
        patch.setattr(tempfile, "tempdir", str(folder))
        yield


@pytest.fixture(autouse=True)
def nothing_remains():
    before = set(own_folders())
    yield
    assert set(own_folders()) <= before
    end = time.monotonic() + 5
    while own_processes() and time.monotonic() < end:  # the last ones are being reaped
        time.sleep(0.05)
    assert not own_processes()
