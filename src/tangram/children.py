"""Child processes: ended with who waits for them, and what their logs say went wrong."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_OURS = "tangram: "
_ERROR = re.compile(r"(^|\] ?)[\w.]*(Error|Exception|Interrupt)(: |$)")
_CHARACTERS = 500


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is waited for inside, as Ctrl-C does; the exit code is the signal's.

    Only a main thread can see to that; in another nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
