"""Which attention backend a model's layers get: ours where the configuration has a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tangram.plan.compression_plan import plan_of
from tangram.vllm_plugin.compat.override import override

BACKEND_PATH = "tangram.vllm_plugin.worker.backend.CompressedAttentionBackend"


def install() -> None:
    """Override the choice of the backend in this process.

    The CPU platform ignores the backend that the configuration names, and on the others a
    process-wide registration would take the CUSTOM entry from another plugin.
    """
    from vllm.platforms import current_platform

    override(
        _defining_class(type(current_platform), "get_attn_backend_cls"),
        "get_attn_backend_cls",
        _get_attn_backend_cls,
        {"cls", "selected_backend", "attn_selector_config"},
    )


def _defining_class(cls: type, name: str) -> type:
    return next(c for c in cls.__mro__ if name in vars(c))


def _get_attn_backend_cls(original: Callable) -> Callable:
    """The attention backend of layers whose configuration asks for compression.

    Asked what vLLM asks of any backend that is chosen by name.
    """

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        from vllm.config import get_current_vllm_config_or_none
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        config = get_current_vllm_config_or_none()
        if (
            selected_backend is AttentionBackendEnum.CUSTOM
            and config is not None
            and plan_of(config.additional_config) is not None
        ):
            from tangram.vllm_plugin.worker.backend import CompressedAttentionBackend
            from tangram.vllm_plugin.worker.refusals import refuse_selection

            reasons = CompressedAttentionBackend.validate_configuration(
                device_capability=cls.get_device_capability(), **attn_selector_config._asdict()
            )
            refuse_selection(reasons)
            return BACKEND_PATH
        return original(cls, selected_backend, attn_selector_config, *args, **kwargs)

    return get_attn_backend_cls
