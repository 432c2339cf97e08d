"""Checks that the plugin's classes in the worker are what vLLM asks for."""

from __future__ import annotations

from vllm.v1.worker.utils import extract_layer_index

from tangram.vllm_plugin.compat.hook import Hook, behaves
from tangram.vllm_plugin.worker import backend, storage


def _layer_names() -> str | None:
    """The plugin's cache layers have names that vLLM can order."""
    found = [extract_layer_index(name) for name in (storage.SEALED_NAME, storage.RING_NAME)]
    return None if found == [0, 0] else f"reads layers {found} in our names, expected [0, 0]"


def _complete_classes() -> str | None:
    """The plugin's classes leave no method of vLLM's abstract."""
    for cls in (
        backend.CompressedAttentionBackend,
        backend.CompressedMetadataBuilder,
        backend.CompressedAttentionImpl,
        storage.SealedCache,
        storage.QueryRing,
    ):
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        if missing:
            return f"{cls.__name__} lacks {', '.join(missing)}"
    return None


HOOKS: tuple[Hook, ...] = (
    behaves(
        "abstract methods",
        "vllm.v1.attention.backend:AttentionBackend",
        "the plugin's classes must have all that vLLM's ask for",
        _complete_classes,
        upstream="further methods that vLLM asks for",
        until="as long as the plugin subclasses vLLM's classes",
    ),
    behaves(
        "names of cache layers",
        "vllm.v1.worker.utils:extract_layer_index",
        "orders layers by the one integer in their name",
        _layer_names,
        upstream="caches that belong to no layer",
        until="vLLM lets a backend have a cache of its own",
    ),
)
