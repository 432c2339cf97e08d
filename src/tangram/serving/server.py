"""A vLLM server as a child process: started on a free port, waited for, always ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tangram.children import complaint
from tangram.installed import vllm_command

HOST = "127.0.0.1"
_STOP_TIMEOUT_S = 5.0
_POLL_S = 0.2
# A proxy of the environment is not to come between this process and its own child.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerError(RuntimeError):
    """A server that did not come up, or went away."""


class Server:
    """`vllm serve` with the given arguments; a context manager that ends the whole process group.

    Args:
        name: how messages call it.
        arguments: of `vllm serve`, without host and port.
        log: file that takes all that it prints.
        environment: variables beside those of this process.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.port = free_port()
        address = ("--host", HOST, "--port", str(self.port))
        self.command = vllm_command("serve", *arguments, *address)
        kept = {k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}
        self._environment = {**kept, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{HOST}:{self.port}"

    @property
    def process_group(self) -> int | None:
        """Group of its processes, the workers among them; None when it does not run."""
        return self._process.pid if self._process else None

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # its workers end with it, and Ctrl-C is ours to handle
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_until_healthy(self, timeout_s: float, tick: Callable[[], None] = lambda: None) -> None:
        """Return when it answers; `tick` is called while it does not.

        Raises:
            ServerError: it ended, or was not up in time; the message holds the log's tail.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                self.get("/health")
                return
            except OSError:
                tick()
                time.sleep(_POLL_S)
        raise ServerError(f"{self.name} was not up after {timeout_s:g} s; {self._log_tail()}")

    def check_alive(self) -> None:
        """Raise ServerError, with the log's tail, if the process has ended."""
        code = self._process.poll() if self._process else None
        if code is not None:
            raise ServerError(f"{self.name} ended with code {code}; {self._log_tail()}")

    def get(self, path: str, timeout_s: float = 5.0) -> str:
        """The body of a GET request; raises OSError as urllib does."""
        with _OPENER.open(self.url + path, timeout=timeout_s) as response:
            return str(response.read().decode())

    def log_text(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace")

    def _log_tail(self, lines: int = 25) -> str:
        """The first error and the end of the log: a worker's error is far above its parents'."""
        text = self.log_text()
        error = complaint(text)
        found = f"the first error is\n{error}\n" if error else ""
        return f"{found}the end of {self.log} is\n" + "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """End the process and all its children; asking twice does no harm."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also those of its children that outlived it, and on a second Ctrl-C.
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass
