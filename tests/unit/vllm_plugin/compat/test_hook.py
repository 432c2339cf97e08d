"""The kinds of checks that hooks have, on hooks made up for the test."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from tangram.vllm_plugin.compat import hook as module
from tangram.vllm_plugin.compat.hook import behaves, has, members, takes, takes_by_source

WHY = dict(upstream="nothing", until="ever")


class Base:
    def __init__(self):
        self.set_by_base = 1


class Owner(Base):
    annotated: int
    given = 2

    def method(self, one, *, two=None):
        def inner():
            self.set_inside = one

        return inner


@pytest.fixture(autouse=True)
def sample(monkeypatch):
    """A module `sample` instead of vLLM's."""
    sample = SimpleNamespace(Owner=Owner, thing=SimpleNamespace(part=1))
    monkeypatch.setattr(module, "import_module", {"sample": sample}.__getitem__)


def test_a_missing_field_is_told():
    hook = has("fields", "sample:Owner", "for", "given no_such_field", **WHY)
    assert hook.difference() == "lacks no_such_field"
    assert hook.check().difference == "lacks no_such_field" and not hook.check().ok


def test_members_are_fields_and_what_methods_set_too():
    names = "annotated given method set_by_base set_inside"
    assert has("all", "sample:Owner", "for", names, **WHY).check().ok
    assert set(names.split()) <= members(Owner)
    assert "no_such_field" not in members(Owner)


def test_a_module_has_members():
    assert has("names", "sample", "for", "Owner thing", **WHY).check().ok
    assert has("names", "sample", "for", "Owner other", **WHY).difference() == "lacks other"


def test_what_a_hook_covers():
    assert has("a", "sample", "for", "Owner", **WHY).covered == {"sample", "sample:Owner"}
    whole = {"sample:thing", "sample:thing.part", "sample:thing.part.real"}
    assert has("a", "sample:thing.part", "for", "real", **WHY).covered == whole
    assert takes("a", "sample:Owner.method", "for", "one", **WHY).covered == {
        "sample:Owner",
        "sample:Owner.method",
    }


def test_a_missing_parameter_is_told():
    hook = takes("a", "sample:Owner.method", "for", "one two three", **WHY)
    assert hook.difference() == "takes (self, one, two), lacks three"


@pytest.mark.parametrize("where", ["sample:Owner.no_such_method", "sample:Other.method", "other"])
def test_a_place_that_is_gone_is_a_finding(where):
    assert behaves("a", where, "for", lambda: None, **WHY).check().difference.split(":")[0] in {
        "AttributeError",
        "KeyError",
    }


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package that cannot be imported, with a file of functions."""
    folder = tmp_path / "unbuilt"
    folder.mkdir()
    (folder / "__init__.py").write_text("from unbuilt.file import f, g\nraise ImportError\n")
    (folder / "file.py").write_text("def f(a, /, b, *, c=None): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("function", "parameters", "difference"),
    [
        ("f", "a b c", None),
        ("f", "a d", "takes (a, b, c), lacks d"),
        ("g", "a", "file.py lacks g"),
        ("h", "a", "lacks h"),
    ],
)
def test_a_function_is_read_where_it_cannot_be_imported(package, function, parameters, difference):
    hook = takes_by_source("a", f"unbuilt:{function}", "file.py", "for", parameters, **WHY)
    assert hook.difference() == difference


def test_a_package_that_is_gone_is_told():
    hook = takes_by_source("a", "no_such_package:f", "file.py", "for", "a", **WHY)
    assert hook.difference() == "there is no no_such_package"


def test_the_room_knows_vllm_and_nothing_of_the_plugin():
    files = list(Path(module.__file__).parent.rglob("*.py"))
    imported = {
        node.module
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
    }
    ours = {name for name in imported if name.split(".")[0] == "tangram"}
    assert len(files) > 10
    assert {name for name in ours if "vllm_plugin.compat" not in name} <= {"tangram.errors"}
