"""Child processes that stand for a server: waited for, watched, and always ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tangram.serving import server
from tangram.serving.server import Server, ServerError

LISTEN = """
import http.server, os, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, os.environ.get("GIVEN"), os.environ.get("VLLM_CPU_KVCACHE_SPACE"))
sys.stdout.flush()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        self.wfile.write(b"fine")
    def log_message(self, *arguments):
        pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def make(monkeypatch, tmp_path):
    def make(code: str) -> Server:
        command = [sys.executable, "-c", code]
        monkeypatch.setattr(server, "vllm_command", lambda *arguments: [*command, *arguments])
        return Server("the server", ["model"], tmp_path / "log", {"GIVEN": "yes"})

    return make


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def child_of(running: Server) -> int:
    return int(running.log_text().split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_it_is_waited_for_and_ends_with_its_children(make, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with make(LISTEN) as running:
        running.wait_until_healthy(60)
        assert running.get("/health") == "fine"
        assert running.log_text().split()[2:4] == ["yes", "None"]
        with pytest.raises(OSError):
            running.get("/nothing")
        child = child_of(running)
        assert is_alive(child)
    assert wait_for(lambda: not is_alive(child))
    running.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_one_that_ignores_the_signal_is_killed(make, monkeypatch):
    monkeypatch.setattr(server, "_STOP_TIMEOUT_S", 0.3)
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LISTEN
    with pytest.raises(KeyboardInterrupt), make(stubborn) as running:
        running.wait_until_healthy(60)
        child, pid = child_of(running), running._process.pid
        raise KeyboardInterrupt
    assert wait_for(lambda: not is_alive(child) and not is_alive(pid))


def test_one_that_ends_at_once_shows_the_end_of_its_log(make):
    code = "print('first'); [print('line', i) for i in range(40)]; raise SystemExit('why not')"
    with make(code) as running, pytest.raises(ServerError) as raised:
        running.wait_until_healthy(60)
    message = str(raised.value)
    assert "the server ended with code 1" in message and "why not" in message
    assert "line 39" in message and "first" not in message


def test_the_first_error_is_shown_however_far_above_the_end(make):
    code = """
print("(APIServer pid=1) WARNING 01-01 [a.py:1] errors like `OSError: [Errno 24] x`. Consider")
print("(Worker pid=2) ERROR 01-01 00:00:00 [b.py:2] ValueError: the cause " + "x" * 9999)
[print("line", i) for i in range(40)]
raise RuntimeError("the consequence")
"""
    with make(code) as running, pytest.raises(ServerError) as raised:
        running.wait_until_healthy(60)
    message = str(raised.value)
    assert "the first error is\n(Worker pid=2) ERROR" in message and "the cause" in message
    assert "the consequence" in message and len(message) < 3000


def test_one_that_is_not_up_in_time(make):
    ticks = []
    with make("import time; time.sleep(600)") as running:
        with pytest.raises(ServerError, match="was not up after 0.5 s"):
            running.wait_until_healthy(0.5, lambda: ticks.append(1))
        pid = running._process.pid
    assert ticks
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_port_is_free_when_it_is_given():
    first, second = server.free_port(), server.free_port()
    assert 0 < first < 65536 and 0 < second < 65536


def test_ctrl_c_at_the_terminal_does_not_reach_it(make):
    before = signal.getsignal(signal.SIGINT)
    with make("import time; time.sleep(600)") as running:
        assert os.getpgid(running._process.pid) != os.getpgid(0)
        assert isinstance(running._process, subprocess.Popen)
    assert signal.getsignal(signal.SIGINT) is before
