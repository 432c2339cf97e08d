"""Child processes: ended with who waits for them, and what their logs say went wrong."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_OURS = "tangram: "
_ERROR = re.compile(r"(^|\] ?)[\w.]*(Error|Exception|Interrupt)(: |$)")
_CHARACTERS = 500
_PARENT_VARIABLE = "TANGRAM_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is waited for inside, as Ctrl-C does; the exit code is the signal's.

    Only a main thread can see to that; in another nothing changes.
    """

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    with _handled({signal.SIGTERM: stop}):
        yield


@contextmanager
def child(
    command: Sequence[str], environment: Mapping[str, str], **options: Any
) -> Iterator[subprocess.Popen]:
    """A child process that ends when the block does, however that ends.

    SIGTERM ends the block as in `ended_by_sigterm`, Ctrl-C by KeyboardInterrupt even where an event
    loop has taken SIGINT over. A command that calls `follow_parent` ends with a parent that was
    killed, too.

    Args:
        command: what is run.
        environment: variables beside those of this process.
        options: of `subprocess.Popen`.
    """
    process = None
    variables = {**os.environ, **environment, _PARENT_VARIABLE: str(os.getpid())}
    with ended_by_sigterm(), _handled({signal.SIGINT: signal.default_int_handler}):
        try:
            with _held_back():
                process = subprocess.Popen(command, env=variables, **options)
            yield process
        finally:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait()


def follow_parent() -> bool:
    """Whether this process was started by `child`; if so, it ends when its parent does.

    The kernel sees to that on Linux. Elsewhere only a parent that is gone already is noticed.

    Raises:
        SystemExit: the parent is gone.
    """
    parent = os.environ.pop(_PARENT_VARIABLE, None)
    if parent is None:
        return False
    if sys.platform == "linux":
        nothing = ctypes.c_ulong(0)
        killed = ctypes.c_ulong(signal.SIGKILL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, killed, nothing, nothing, nothing)
    if str(os.getppid()) != parent:
        raise SystemExit(128 + signal.SIGKILL)
    return True


@contextmanager
def _held_back() -> Iterator[None]:
    """Signals that would raise inside do so at the end.

    They are not blocked: a child would inherit that.
    """
    came: list[int] = []
    try:
        with _handled(
            dict.fromkeys((signal.SIGTERM, signal.SIGINT), lambda number, _: came.append(number))
        ):
            yield
    finally:
        for number in came:
            signal.raise_signal(number)


@contextmanager
def _handled(handlers: Mapping[int, Callable[[int, Any], Any]]) -> Iterator[None]:
    """Handlers of signals inside; none of those that are ignored, nor in other threads."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in handlers}
        before = {number: was for number, was in before.items() if was is not signal.SIG_IGN}
    try:
        for number in before:
            signal.signal(number, handlers[number])
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def complaint(log: str) -> str | None:
    """What a process said of why it ended; None if it named nothing.

    A command of this package says it in its last words. Of vLLM's processes the first that names an
    error is the one that had it: a worker's is far above its parents'.
    """
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if own := [line for line in lines if line.startswith(_OURS)]:
        return own[-1].removeprefix(_OURS)
    found = next((line for line in lines if _ERROR.search(line)), None)
    return None if found is None else found[:_CHARACTERS]
