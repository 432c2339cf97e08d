"""The members that are reviewed are those of every class that is subclassed."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch import nn

from tangram.vllm_plugin.compat import members
from tests.unit.vllm_plugin.compat.relied import Sources
from tests.unit.vllm_plugin.compat.test_covered import texts


def test_no_class_that_is_subclassed_is_left_out():
    found = set().union(*Sources(texts()).subclassed().values())
    assert set(members.SUBCLASSED) == found
    assert len(members.SUBCLASSED) == len(found)


def test_a_class_that_is_subclassed_is_found_through_classes_of_ours():
    source = (
        "import vllm.config as c\nfrom vllm import LLM\n"
        "class A(object, LLM): pass\nclass B(A): pass\nclass C(c.VllmConfig[int]): pass\n"
        "class D: pass"
    )
    assert Sources({"a.py": source}).subclassed() == {
        "A": {"vllm:LLM"},
        "B": {"vllm:LLM"},
        "C": {"vllm.config:VllmConfig"},
    }


def test_members_are_a_class_s_own_and_no_dunders():
    class Sample(nn.Module):
        field: int
        given = 1

        def method(self):
            pass

        def _inner(self):
            pass

        @property
        def asked(self):
            return 1

    assert members.own_members(Sample) == {"_inner", "asked", "field", "given", "method"}
