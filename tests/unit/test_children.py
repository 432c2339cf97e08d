"""Child processes: SIGTERM ends what is waited for, and logs say what went wrong."""

import os
import signal
import threading

import pytest

from tangram.children import complaint, ended_by_sigterm

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
