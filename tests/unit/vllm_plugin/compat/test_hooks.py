"""The hooks of the installed vLLM, and what is said when one of them has changed."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

from tangram.vllm_plugin.compat import checks as hook_checks
from tangram.vllm_plugin.compat import hooks


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
    with pytest.raises(RuntimeError, match=r"spec of a layer \(vllm.*Install vLLM 0\.32"):
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


def test_a_missing_field_is_told():
    hook = hook_checks.has("fields", "vllm.config:CacheConfig", "for", "block_size no_such_field")
    assert hook.difference() == "lacks no_such_field"


@pytest.mark.parametrize("version", ["0.31.1", "0.33.0", "0.320.0", "1.0"])
def test_another_release_is_told(monkeypatch, version):
    monkeypatch.setattr("vllm.__version__", version)
    assert difference("version") == f"is {version}, expected 0.32"


@pytest.mark.parametrize("version", ["0.32", "0.32.0", "0.32.1+cpu"])
def test_releases_that_fit(monkeypatch, version):
    monkeypatch.setattr("vllm.__version__", version)
    assert hook_checks.version() is None


def test_the_platform_has_a_name():
    assert hooks.describe_platform().split()[0] in {"cpu", "cuda", "rocm", "xpu"}
