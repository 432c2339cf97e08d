"""The log of automatic calibration, whose place can be foretold."""

import os

import pytest

from tangram.errors import ConfigurationError
from tangram.vllm_plugin.frontend import auto_profile


@pytest.fixture(autouse=True)
def nothing_is_started(monkeypatch):
    def start(*arguments, **options):
        pytest.fail("a process was started")

    monkeypatch.setattr(auto_profile.subprocess, "Popen", start)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_the_place_of_the_log_is_not_followed(tmp_path, there):
    other = tmp_path / "other"
    if there:
        other.write_text("whole")
    (tmp_path / "p.log").symlink_to(other)
    with pytest.raises(ConfigurationError, match="p.log cannot be written.*remove it"):
        auto_profile._calibrate(tmp_path / "p.profile", [], "m")
    assert other.exists() == there and (not there or other.read_text() == "whole")


def test_a_pipe_in_the_place_of_the_log_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.log")
    with pytest.raises(ConfigurationError, match="p.log cannot be written"):
        auto_profile._calibrate(tmp_path / "p.profile", [], "m")
