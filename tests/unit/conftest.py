"""What the tests of several rooms share."""

import sys

import pytest

from tests.page_scorer import install


@pytest.fixture
def my_scorers(tmp_path, monkeypatch):
    """The package of docs/add-a-scorer.md, installed; its module's name."""
    module = install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield module
    for loaded in [m for m in sys.modules if m.split(".")[0] == module.split(".")[0]]:
        del sys.modules[loaded]
