"""Nothing of vLLM is relied on without a hook that checks it."""

import ast
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tangram.vllm_plugin.compat.hook import has
from tangram.vllm_plugin.frontend.hooks import hooks
from tests.unit.test_layers import imported_packages
from tests.unit.vllm_plugin.compat.relied import (
    REVIEWED,
    Coverage,
    Sources,
    not_covered,
    own_names,
)

SRC = Path(__file__).resolve().parents[4] / "src"
ROOMS = (SRC / "tangram/vllm_plugin", SRC / "tangram/engines")


def texts() -> dict[str, str]:
    """Every file of the two rooms, and any other that imports vLLM."""
    files = {path: path.read_text() for path in sorted(SRC.rglob("*.py"))}
    return {
        str(path.relative_to(SRC)): text
        for path, text in files.items()
        if any(path.is_relative_to(room) for room in ROOMS) or "vllm" in imported_packages(text)
    }


@pytest.fixture(scope="module")
def ours():
    return own_names(path.read_text() for path in SRC.rglob("*.py"))


@pytest.fixture(scope="module")
def coverage(ours):
    return Coverage([hook for places in hooks().values() for hook in places], ours)


def test_everything_that_is_relied_on_has_a_hook(coverage):
    sources = Sources(texts())
    assert len(sources.trees) > 40
    assert not_covered(sources, coverage) == []


SNIPPETS = {
    "a field": ("def f(config): return config.scheduler_config.no_such_field", "no_such_field"),
    "a field that is set": ("def f(config): config.no_such_field = 1", "no_such_field"),
    "by its name": ("def f(x): return getattr(x, 'no_such_field', None)", "no_such_field"),
    "whether it is there": ("def f(x): return hasattr(x, 'no_such_field')", "no_such_field"),
    "by a name of ours that vLLM has too": ("def f(s): return s.token_ids", "token_ids"),
    "by any name": ("def f(x, n): return getattr(x, n)", "getattr(x, n)"),
    "an import": ("from vllm.v1.request import StreamingUpdate", "vllm.v1.request:StreamingUpdate"),
    "an import inside": ("def f():\n from vllm import PoolingParams", "vllm:PoolingParams"),
    "of a module": ("import vllm\nx: vllm.PoolingParams", "vllm:PoolingParams"),
    "a module": ("import vllm.sequence", "vllm.sequence"),
    "a method": (
        "from vllm.v1.attention.backend import AttentionBackend as B\n"
        "class Ours(B):\n"
        "    def supports_sink(cls): return True",
        "vllm.v1.attention.backend:AttentionBackend.supports_sink",
    ),
    "a method of a class under it": (
        "from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager\n"
        "class Ours:\n"
        "    def new_step_starts(self): pass\n"
        "class Both(Ours, FullAttentionManager): pass",
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.new_step_starts",
    ),
    "an attribute of instances": (
        "from vllm.v1.attention.backend import AttentionImpl\n"
        "class Ours(AttentionImpl):\n"
        "    def __init__(self): self.dcp_rank = 0",
        "vllm.v1.attention.backend:AttentionImpl.dcp_rank",
    ),
    "a method from outside": (
        "from vllm.v1.core.sched.scheduler import Scheduler\n"
        "override(Scheduler, 'add_request', make, set())",
        "vllm.v1.core.sched.scheduler:Scheduler.add_request",
    ),
    "of a class found at run time": ("override(find(x), 'no_such_name', f, set())", "no_such_name"),
}


@pytest.mark.parametrize("what", SNIPPETS)
def test_what_has_no_hook_is_found(what, coverage):
    source, name = SNIPPETS[what]
    found = not_covered(Sources({"snippet.py": source}), coverage)
    assert f"snippet.py:{line_of(source, name)}: {name}" in found
    assert {line.split(": ")[1].rpartition(".")[2] for line in found} == {name.rpartition(".")[2]}


def line_of(source: str, name: str) -> int:
    last = name.rpartition(".")[2].rpartition(":")[2]
    return max(n for n, line in enumerate(source.splitlines(), 1) if last in line)


def test_a_name_that_is_checked_is_covered(ours):
    source = "from vllm.config import CacheConfig\ndef f(c: CacheConfig): return c.cache_dtype"
    given = dict(upstream="", until="")
    whole = has("whole", "vllm.config:CacheConfig", "for", "cache_dtype", **given)
    part = has("part", "vllm.config:CacheConfig", "for", "block_size", **given)
    assert not_covered(Sources({"a.py": source}), Coverage([whole], ours)) == []
    assert not_covered(Sources({"a.py": source}), Coverage([part], ours)) == ["a.py:2: cache_dtype"]


def test_the_list_of_reviewed_names_has_none_too_many(ours):
    """A name that is read no more, or that a hook has, goes from the list."""
    coverage = Coverage([hook for places in hooks().values() for hook in places], ours)
    read = {use.name for use in Sources(texts()).attributes()}
    assert set(REVIEWED) - read == set()
    assert set(REVIEWED) & coverage.names == set()
    assert all(reason and ast.parse(name) for name, reason in REVIEWED.items())
