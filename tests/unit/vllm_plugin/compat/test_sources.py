"""What lies where in files that are read and not imported."""

import ast

import pytest

from tangram.vllm_plugin.compat.sources import Sources, body_hash, own_members, signature
from tests.unit.vllm_plugin.compat.packages import write

FILES = {
    "__init__.py": """
        import typing
        MODULE_ATTRS = {"LLM": ".llm:LLM"}
        if typing.TYPE_CHECKING:
            from vllm.llm import LLM
        else:
            def __getattr__(name): ...
    """,
    "llm.py": """
        from .base import Base
        class LLM(Base, dict): 
            def __init__(self): self.engine = None
    """,
    "base.py": """
        from __future__ import annotations
        try:
            import fast
        except ImportError:
            fast = None
        class Base:
            field: int
            given = other = 1
            def inherited(self): ...
        alias = Base
        class Kind:
            FIRST = 1
            @property
            def is_first(self): ...
        if fast:
            the_base: Base = Base()
    """,
    "group/__init__.py": "from .inner import thing\nfrom . import inner as named",
    "group/inner.py": "from ..base import Base as thing",
}


@pytest.fixture
def sources(tmp_path):
    return Sources(write(tmp_path, FILES))


@pytest.mark.parametrize(
    ("where", "at"),
    [
        ("vllm:LLM", "vllm.llm:LLM"),
        ("vllm:LLM.engine", "vllm.llm:LLM.engine"),
        ("vllm:LLM.inherited", "vllm.base:Base.inherited"),
        ("vllm.base:alias.field", "vllm.base:Base.field"),
        ("vllm.base:the_base.other", "vllm.base:Base.other"),
        ("vllm.base:Kind.FIRST.is_first", "vllm.base:Kind.is_first"),
        ("vllm.base:fast", "vllm.base:fast"),
        ("vllm.group:thing.given", "vllm.base:Base.given"),
        ("vllm.group:named.thing", "vllm.base:Base"),
        ("vllm.group:inner", "vllm.group.inner"),
        ("vllm.group.inner", "vllm.group.inner"),
    ],
)
def test_a_place_is_found_where_it_is_defined(sources, where, at):
    assert sources.find(where).at == at


@pytest.mark.parametrize(
    "where",
    ["vllm:Other", "vllm:LLM.absent", "vllm.other", "vllm.other:LLM", "vllm.base:fast.absent"],
)
def test_what_is_not_there_is_not_found(sources, where):
    assert sources.find(where) is None


def test_a_class_and_those_under_it(sources):
    assert [base.at for base in sources.bases(sources.find("vllm:LLM"))] == [
        "vllm.llm:LLM",
        "vllm.base:Base",
    ]
    assert own_members(sources.find("vllm.base:Base").node) == {
        "field",
        "given",
        "inherited",
        "other",
    }


def test_files_without_a_version(sources):
    assert sources.version == "unknown"


def function(text: str) -> ast.FunctionDef:
    (node,) = ast.parse(text).body
    return node


def test_a_signature_has_defaults_and_no_types():
    given = function("def f(a, /, b: int, c=(1, 2), *, d, e: str = 'x', **more): ...")
    assert signature(given) == ("a", "/", "b", "c=(1, 2)", "*", "d", "e='x'", "**more")
    assert signature(function("def f(*args, d=1): ...")) == ("*args", "d=1")
    assert signature(function("def f(): ...")) == ()


def test_a_body_is_told_by_what_it_does():
    given = body_hash(function("def f(x):\n    return x.a + 1"))
    same = "def g(x: int) -> int:\n    '''Says so.'''\n    # and why\n    return (x.a + 1)"
    assert body_hash(function(same)) == given == "686f9e147e35"
    others = ["return x.a + 2", "return x.b + 1", "return x.a - 1", "x.a + 1"]
    changed = {body_hash(function(f"def f(x):\n    {other}")) for other in others}
    decorated = body_hash(function("@property\ndef f(x):\n    return x.a + 1"))
    assert len(changed | {given, decorated}) == 6
