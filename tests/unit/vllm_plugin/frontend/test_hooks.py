"""The hooks of the installed vLLM, and what is said when one of them has changed."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from tangram.vllm_plugin.compat import members, version
from tangram.vllm_plugin.core.specs import RecentSpec
from tangram.vllm_plugin.frontend import hooks


def test_the_installed_vllm_has_every_hook():
    results = hooks.check_hooks()
    assert [(r.name, r.difference) for r in results if not r.ok] == []
    assert len({r.name for r in results}) == len(results) > 30
    assert all(r.where.startswith("vllm") and r.reason for r in results)
    hooks.require_hooks()


def difference(name: str) -> str:
    (result,) = [r for r in hooks.check_hooks() if r.name == name]
    assert not result.ok
    return result.difference


def test_a_hook_that_is_gone_is_named(monkeypatch):
    monkeypatch.delattr(AttentionBackend, "customize_spec")
    assert "customize_spec" in difference("spec of a layer")
    with pytest.raises(RuntimeError, match=r"spec of a layer \(vllm.*Install vLLM 0\.32 or 0\.33"):
        hooks.require_hooks()


def test_another_signature_is_told(monkeypatch):
    monkeypatch.setattr(AttentionBackend, "customize_spec", classmethod(lambda cls, layer: None))
    assert difference("spec of a layer") == "takes (layer), lacks spec"


def test_another_behaviour_is_told(monkeypatch):
    monkeypatch.setattr(
        SlidingWindowManager,
        "remove_skipped_blocks",
        lambda self, request_id, tokens: self._remove_blocks_in_range(request_id, 0, 3),
    )
    assert "expected blocks 0 to 2" in difference("freeing recent blocks")


def test_a_piece_that_is_no_longer_called_is_told(monkeypatch):
    from vllm.v1.worker import utils

    monkeypatch.setattr(utils, "customize_attention_spec", lambda backend, spec: spec)
    assert difference("spec of a layer, asked for") == "no longer uses customize_spec"


@pytest.mark.parametrize("release", ["0.31.1", "0.34.0", "0.320.0", "1.0"])
def test_another_release_is_told(monkeypatch, release):
    monkeypatch.setattr("vllm.__version__", release)
    assert difference("version") == f"is {release}, expected 0.32 or 0.33"


@pytest.mark.parametrize("release", ["0.32", "0.32.0", "0.32.1+cpu", "0.33.0", "0.33.1"])
def test_releases_that_fit(monkeypatch, release):
    monkeypatch.setattr("vllm.__version__", release)
    assert version.version_difference() is None


def test_the_platform_has_a_name():
    assert version.describe_platform().split()[0] in {"cpu", "cuda", "rocm", "xpu"}


def test_a_member_that_another_release_adds_or_drops_is_named(monkeypatch):
    monkeypatch.setattr(AttentionBackend, "supports_new_things", True, raising=False)
    assert difference("members of AttentionBackend") == (
        "AttentionBackend has new members supports_new_things: review whether compression must "
        "override any"
    )
    monkeypatch.delattr(AttentionBackend, "is_ssm")
    with pytest.raises(
        RuntimeError, match=r"no members is_ssm any more.*Install vLLM 0\.32 or 0\.33"
    ):
        hooks.require_hooks()


def test_a_class_that_another_release_puts_under_ours_is_named(monkeypatch):
    further = "vllm.entrypoints.rl.offline:RLOfflineMixin"
    monkeypatch.delitem(members._REVIEWS, further)
    assert difference("members of LLM") == f"LLM has new bases {further}"


def test_a_block_table_that_would_lose_raw_tokens_is_told(monkeypatch):
    """Model runner V2 of 0.33 would read the null block in their place, without a word."""
    monkeypatch.delattr(RecentSpec, "num_retained_tokens")
    monkeypatch.setattr(SlidingWindowSpec, "num_retained_tokens", 32, raising=False)
    assert difference("raw tokens in the block table") == "keeps 32 tokens, expected 287"


def test_classes_of_ours_that_cannot_be_imported_are_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "tangram.vllm_plugin.worker.checks", None)
    assert difference("The plugin's classes in the worker").startswith("ModuleNotFoundError")


def test_every_hook_says_what_it_waits_for():
    listed = [hook for places in hooks.hooks().values() for hook in places]
    assert all(hook.upstream and hook.until for hook in listed)
    assert [h for h in listed if "\n" in h.upstream + h.until or len(h.upstream) > 90] == []


def test_the_page_is_the_list():
    page = Path(__file__).resolve().parents[4] / "docs/hooks.md"
    command = "python -m tangram.vllm_plugin.frontend.hooks docs/hooks.md"
    assert page.read_text() == hooks.page(hooks.hooks()), f"run: {command}"
    assert command in page.read_text()
