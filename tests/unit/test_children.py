"""Child processes: SIGTERM ends what is waited for, and logs say what went wrong."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from tangram.children import child, complaint, ended_by_sigterm, follow_parent

WORKER = """INFO starting
(Worker pid=7) ERROR [gpu_worker.py:3] torch.OutOfMemoryError: CUDA out of memory
(EngineCore pid=6) RuntimeError: the worker is gone
Loading weights:  45%
"""


def test_the_first_error_is_the_one_that_had_it():
    assert "OutOfMemoryError: CUDA out of memory" in complaint(WORKER)
    assert len(complaint("ValueError: " + "x" * 9999)) == 500


def test_a_command_of_this_package_says_it_last():
    text = WORKER + "tangram: --data x.jsonl holds no text\nLoading weights: 100%\n"
    assert complaint(text) == "--data x.jsonl holds no text"


@pytest.mark.parametrize("text", ["", "\n \n", "INFO no errors so far\nLoading weights: 3%"])
def test_nothing_is_made_up(text):
    assert complaint(text) is None


def test_sigterm_ends_what_is_inside_and_is_as_before_afterwards():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as raised, ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    assert raised.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_change_no_handler():
    seen = []

    def work():
        with ended_by_sigterm():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


FOLLOWER = """
import time
from tangram.children import follow_parent
assert follow_parent() and not follow_parent()
print("follows", flush=True)
time.sleep(30)
print("survived", flush=True)
"""
PARENT = """
import sys
from tangram.children import child
with child([sys.executable, "-c", sys.argv[1]], {}) as process:
    process.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends children on Linux alone")
def test_a_child_ends_with_a_parent_that_was_killed():
    command = [sys.executable, "-c", PARENT, FOLLOWER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "follows\n"
        parent.kill()
        assert parent.stdout.read() == "", "which is at its end when the child is, too"


def test_a_child_whose_parent_is_gone_already_does_nothing(monkeypatch):
    script = "from tangram.children import follow_parent; follow_parent(); print('went on')"
    command = ["env", f"TANGRAM_PARENT_PID={os.getpid()}1", sys.executable, "-c", script]
    with child(command, {}, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0] == ""
    assert process.returncode == 128 + signal.SIGKILL


def test_who_was_started_by_hand_follows_nobody():
    assert not follow_parent()


def test_a_child_ends_with_the_block():
    with child(["sleep", "60"], {}) as process:
        assert process.poll() is None
    assert process.returncode == -signal.SIGTERM


def test_signals_that_are_ignored_stay_so(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with child(["true"], {}) as process:
            os.kill(os.getpid(), signal.SIGINT)
            assert process.wait() == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
