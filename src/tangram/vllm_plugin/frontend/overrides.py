"""Flags and configuration of an engine: overrides that no entry point of vLLM offers.

All of them ask the configuration first and hand over to vLLM's own code when it does not ask for
compression.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from tangram.plan.options import (
    CONFIG_KEY,
    CompressionOptions,
    add_flags,
    option_names,
    options_from_flags,
    take_flags_whole,
)
from tangram.vllm_plugin.compat.override import override

logger = logging.getLogger("vllm.tangram")


def install() -> None:
    """Install the flags and the override of the configuration in this process.

    The flags come last: where an override does not fit this vLLM, its parser does not know them.
    """
    from vllm.config import SchedulerConfig
    from vllm.engine.arg_utils import EngineArgs

    override(SchedulerConfig, "get_scheduler_cls", _get_scheduler_cls, {"self"})
    override(EngineArgs, "create_engine_config", _create_engine_config, {"self"})
    override(EngineArgs, "from_cli_args", _from_cli_args, {"cls", "args"})
    override(EngineArgs, "add_cli_args", _add_cli_args, {"parser"})


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
            config[CONFIG_KEY] = {**told, **given}
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


def _get_scheduler_cls(original: Callable) -> Callable:
    """vLLM warns that a scheduler from outside may be slow, which ours is not: it is vLLM's own."""

    def get_scheduler_cls(self: Any) -> Any:
        if not str(self.scheduler_cls).startswith("tangram."):
            return original(self)
        from tangram.vllm_plugin.core.admission import ADMITS_BY_HISTORY, history_scheduler

        if self.scheduler_cls != ADMITS_BY_HISTORY:
            return original(self)
        # As vLLM asks, and not when a configuration is made: what a platform lacks comes between.
        return history_scheduler(bool(self.async_scheduling))

    return get_scheduler_cls
