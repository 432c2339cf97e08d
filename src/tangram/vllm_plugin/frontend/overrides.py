"""The overrides of vLLM that no registry or entry point offers, each with its reason.

All of them ask the configuration first and hand over to vLLM's own code when it does not ask for
compression.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from tangram.plan.options import (
    AUTO_PROFILE,
    CONFIG_KEY,
    CompressionOptions,
    add_flags,
    option_names,
    options_from_flags,
    take_flags_whole,
)

logger = logging.getLogger("vllm.tangram")

BACKEND_PATH = "tangram.vllm_plugin.worker.backend.CompressedAttentionBackend"
WORKER_EXTENSION_PATH = "tangram.vllm_plugin.worker.extension.CompressionWorkerExtension"


def override(owner: type, name: str, make: Callable[[Any], Any], parameters: set[str]) -> None:
    """Replace a method of vLLM once per process, after checking that it takes what we expect.

    Raises:
        RuntimeError: vLLM changed under the plugin.
    """
    original = inspect.getattr_static(owner, name, None)
    function = getattr(original, "__func__", original)
    if getattr(function, "overridden_by_tangram", False):
        return
    found = set(inspect.signature(function).parameters) if callable(function) else set()
    if not parameters <= found:
        raise RuntimeError(
            f"{owner.__module__}.{owner.__name__}.{name} of this vLLM takes {sorted(found)}, "
            f"expected {sorted(parameters)}: install vLLM 0.32"
        )
    wrapped = functools.wraps(function)(make(function))
    wrapped.overridden_by_tangram = True  # type: ignore[attr-defined]
    kind = type(original) if isinstance(original, staticmethod | classmethod) else lambda f: f
    setattr(owner, name, kind(wrapped))


def install() -> None:
    """Install the flags and the overrides in this process.

    On a vLLM that they do not fit this ends with a warning: vLLM loads the plugin whether or not
    anyone asks for compression. Whoever does is refused, by `hooks.require_hooks` in what comes
    first here, or by a parser that does not know the flags, which come last.
    """
    try:
        _install()
    except Exception as error:
        logger.warning("KV cache compression is not available: %s", error)


def _install() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    override(EngineArgs, "create_engine_config", _create_engine_config, {"self"})
    # The CPU platform ignores the backend that the configuration names, and on the others a
    # process-wide registration would take the CUSTOM entry from another plugin.
    override(
        _defining_class(type(current_platform), "get_attn_backend_cls"),
        "get_attn_backend_cls",
        _get_attn_backend_cls,
        {"cls", "selected_backend", "attn_selector_config"},
    )
    override(EngineArgs, "from_cli_args", _from_cli_args, {"cls", "args"})
    override(EngineArgs, "add_cli_args", _add_cli_args, {"parser"})


def _defining_class(cls: type, name: str) -> type:
    return next(c for c in cls.__mro__ if name in vars(c))


def _add_cli_args(original: Callable) -> Callable:
    """vLLM has no hook for a plugin's own flags; plugins are loaded before this runs."""

    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        add_flags(parser)
        take_flags_whole(parser)
        return parser

    return add_cli_args


def _from_cli_args(original: Callable) -> Callable:
    """Carries the flags over into `additional_config`, which reaches every process.

    Into that of the parsed arguments too: of several API servers each is given these, and makes
    its engine arguments from them before its plugins are loaded.
    """

    def from_cli_args(cls: Any, args: Any) -> Any:
        engine_args = original(cls, args)
        given = options_from_flags(args)
        if given is not None:
            config = dict(engine_args.additional_config or {})
            told = config.get(CONFIG_KEY, {})
            CompressionOptions.from_mapping(told)  # raises for what is no mapping
            config[CONFIG_KEY] = {"compression_profile": AUTO_PROFILE, **told, **given}
            engine_args.additional_config = args.additional_config = config
        return engine_args

    return from_cli_args


def _create_engine_config(original: Callable) -> Callable:
    """The one place where every way to start vLLM passes with all options known."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        additional = self.additional_config
        if not isinstance(additional, dict):
            return original(self, *args, **kwargs)
        if CONFIG_KEY not in additional:
            if misplaced := option_names() & set(additional):
                logger.warning(
                    "KV cache compression is off: %s of additional_config belongs under %s",
                    ", ".join(sorted(misplaced)),
                    CONFIG_KEY,
                )
            return original(self, *args, **kwargs)
        options = CompressionOptions.from_mapping(additional[CONFIG_KEY])
        if not options.enable_compression:
            return original(self, *args, **kwargs)
        from tangram.vllm_plugin.frontend.configure import configure

        return configure(self, options, lambda: original(self, *args, **kwargs))

    return create_engine_config


def _get_attn_backend_cls(original: Callable) -> Callable:
    """The attention backend of layers whose configuration asks for compression.

    Asked what vLLM asks of any backend that is chosen by name.
    """

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        from vllm.config import get_current_vllm_config_or_none
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        from tangram.plan.compression_plan import plan_of

        config = get_current_vllm_config_or_none()
        if (
            selected_backend is AttentionBackendEnum.CUSTOM
            and config is not None
            and plan_of(config.additional_config) is not None
        ):
            from tangram.vllm_plugin.refusals import refuse_selection
            from tangram.vllm_plugin.worker.backend import CompressedAttentionBackend

            reasons = CompressedAttentionBackend.validate_configuration(
                device_capability=cls.get_device_capability(), **attn_selector_config._asdict()
            )
            refuse_selection(reasons)
            return BACKEND_PATH
        return original(cls, selected_backend, attn_selector_config, *args, **kwargs)

    return get_attn_backend_cls
