"""A command line that a test can call, in the test's own folder."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastattn_compile.cli.app import app


@pytest.fixture
def fastattn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def call(*words):
        monkeypatch.setattr("sys.argv", ["fastattn", *words])
        return CliRunner().invoke(app, list(words))

    yield call
    torch.set_num_threads(threads)
