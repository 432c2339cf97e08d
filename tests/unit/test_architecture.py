"""docs/architecture.md holds the rooms as they are, and names files that are there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
SRC = ROOT / "src" / "tangram"


def test_the_picture_is_what_the_command_draws():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "rooms.py")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"```text\n{done.stdout}```" in PAGE
    assert len(done.stdout.splitlines()) > 30


def test_files_that_are_named_are_there():
    named = set(re.findall(r"`([\w/]+/[\w/]*\w+\.py)`", PAGE))
    assert len(named) > 12
    for name in named:
        places = (SRC / name, SRC / "vllm_plugin" / name, ROOT / name)
        assert any(place.is_file() for place in places), name
