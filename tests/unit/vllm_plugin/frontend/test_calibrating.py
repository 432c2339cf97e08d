"""The process that calibrates for a server: what ends it, and what is said of its end."""

import os
import signal
import subprocess
import sys

import pytest

from tangram.errors import ConfigurationError
from tangram.vllm_plugin.frontend import auto_profile


@pytest.fixture(autouse=True)
def a_terminal_s_signals():
    """Ctrl-C as a terminal's process has it: a run in the background is given SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Has a shell script run in the place of this interpreter."""

    def stand_in(script):
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))

    return stand_in


@pytest.fixture
def logged(monkeypatch, caplog):
    monkeypatch.setattr(auto_profile.logger, "propagate", True)
    caplog.set_level("INFO", "vllm.tangram")
    return caplog


def calibrate(tmp_path, **environment):
    auto_profile._calibrate(tmp_path / "p.profile", [], "m", environment)


def test_the_reason_of_a_failure_is_the_exception_and_not_the_last_line(tmp_path, command):
    command(
        "printf 'Traceback (most recent call last):\\n  File \"x.py\"\\n'\n"
        "printf 'torch.OutOfMemoryError: no memory\\nLoading weights: 3%%\\rLoading weights: 9%%'\n"
        "exit 1"
    )
    with pytest.raises(ConfigurationError) as raised:
        calibrate(tmp_path)
    assert "failed (exit code 1): torch.OutOfMemoryError: no memory (its log" in str(raised.value)
    assert "Loading" not in str(raised.value)


def test_the_environment_is_that_of_the_process_and_what_is_given(tmp_path, command, monkeypatch):
    monkeypatch.setenv("INHERITED", "a")
    command('echo "tangram: $INHERITED $HF_TOKEN"; exit 2')
    with pytest.raises(ConfigurationError, match=r"exit code 2\): a b \(its log"):
        calibrate(tmp_path, HF_TOKEN="b")


@pytest.mark.parametrize(
    "script",
    ["kill -INT $PPID; exec sleep 60", "exit 130", "kill -INT $$; exec sleep 60"],
    ids=["the server", "the command", "a killed command"],
)
def test_ctrl_c_is_told_in_one_line(tmp_path, command, logged, script):
    command(script)
    with pytest.raises(SystemExit, match="130") as raised:
        calibrate(tmp_path)
    assert raised.value.__context__ is None
    assert [record.getMessage() for record in logged.records][1:] == [
        "calibrating was stopped: the next start goes on from there"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_fork_and_its_return_ends_the_child(
    tmp_path, command, monkeypatch, number
):
    """It left the calibration running."""
    started, start = [], subprocess.Popen

    def signalled(*arguments, **options):
        started.append(start(*arguments, **options))
        os.kill(os.getpid(), number)
        return started[0]

    command("exec sleep 60")
    before = signal.getsignal(number)
    monkeypatch.setattr(subprocess, "Popen", signalled)
    with pytest.raises(SystemExit, match=str(128 + number)):
        calibrate(tmp_path)
    (process,) = started
    assert process.returncode == -signal.SIGTERM
    assert signal.getsignal(number) is before
