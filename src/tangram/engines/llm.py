"""vLLM's `LLM` with compression on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm

from tangram.errors import ConfigurationError
from tangram.plan.compression_plan import plan_of
from tangram.plan.options import CONFIG_KEY, CompressionOptions
from tangram.vllm_plugin import register


class LLM(vllm.LLM):
    """`vllm.LLM` whose KV cache is compressed.

    Takes everything that `vllm.LLM` takes, and the options of `CompressionOptions` under the names
    of the flags: `LLM(model, compression_ratio=0.25, compression_scorer="snap_kv")`. The ratio is
    the share of rows that is kept. Without a `compression_profile` one is taken from the cache, or
    calibrated first, once for a model, as a server does; `"none"` is for uniform budgets.

    Raises:
        ConfigurationError: an option that cannot be served; the message names it and the remedy.
    """

    def __init__(
        self,
        model: str,
        *,
        enable_compression: bool = True,
        compression_ratio: float | None = None,
        page_group_size: int | None = None,
        compression_chunk_size: int | None = None,
        compression_window_size: int | None = None,
        compression_n_sink_tokens: int | None = None,
        compression_scorer: str | None = None,
        compression_scorer_parameters: Mapping[str, Any] | None = None,
        compression_level: str | None = None,
        compression_profile: str | None = None,
        compression_drift_sample: int | None = None,
        compression_admission: bool | None = None,
        additional_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = {
            "compression_ratio": compression_ratio,
            "page_group_size": page_group_size,
            "compression_chunk_size": compression_chunk_size,
            "compression_window_size": compression_window_size,
            "compression_n_sink_tokens": compression_n_sink_tokens,
            "compression_scorer": compression_scorer,
            "compression_scorer_parameters": compression_scorer_parameters,
            "compression_level": compression_level,
            "compression_profile": compression_profile,
            "compression_drift_sample": compression_drift_sample,
            "compression_admission": compression_admission,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if given and not enable_compression:
            raise ConfigurationError(
                f"{next(iter(given))} is given with enable_compression=False: leave one of them out"
            )
        config = dict(additional_config or {})
        if CONFIG_KEY in config:
            told = CompressionOptions.from_mapping(config[CONFIG_KEY]).enable_compression
            if told != enable_compression:
                raise ConfigurationError(
                    f"enable_compression={enable_compression} contradicts {CONFIG_KEY} of "
                    f"additional_config, which turns compression {'on' if told else 'off'}: leave "
                    "one of them out"
                )
        if enable_compression:
            config[CONFIG_KEY] = {**config.get(CONFIG_KEY, {}), **given, "enable_compression": True}
        register()
        super().__init__(model, additional_config=config, **kwargs)
        if enable_compression:
            self._check_active()

    def _check_active(self) -> None:
        """Raise RuntimeError unless every worker serves the layout that was planned."""
        plan = plan_of(self.llm_engine.vllm_config.additional_config)
        layouts = {status["layout"] for status in self.collective_rpc("tangram_status")}
        if plan is None or layouts != {plan.geometry.digest}:
            raise RuntimeError(f"compression is not active: workers serve the layouts {layouts}")
