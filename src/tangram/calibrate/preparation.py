"""What a calibration is to do: texts, options and memory, checked before an engine starts."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tangram.arguments import check_output
from tangram.budgets import allocate
from tangram.calibrate import Sample, held_back
from tangram.calibrate.texts.sample_sets import load_samples, load_tokenizer
from tangram.engines.engine_arguments import check_engine_arguments
from tangram.errors import BudgetError, ConfigurationError, UnsupportedError
from tangram.geometry import Geometry
from tangram.installed import is_cpu_build
from tangram.plan.cached import without_profile
from tangram.plan.compression_plan import make_plan
from tangram.plan.dtypes import ITEMSIZE_BYTES, served_dtype
from tangram.plan.model_facts import ModelFacts, served_config
from tangram.plan.models import (
    RECALL_GROUP_SIZE,
    bundled_model,
    is_bundled,
    read_config,
    tokenizer_arguments,
)
from tangram.plan.options import CompressionOptions
from tangram.plan.supported import refuse_model, refuse_options
from tangram.profile import (
    QUERY_COVARIANCE,
    QUERY_MEAN,
    ROPE_FREQUENCIES,
    ROW_WEIGHTS,
    ModelIdentity,
    text_config,
)
from tangram.profile.cache import snapshot_folder, weights_digest

DEFAULT_MAX_TOKENS = 4096
DEFAULT_MEASURE_RATIOS = (0.5, 0.25, 0.1)
DEFAULT_MEASURE_TIME_S = 100.0
"""Of each scorer that is tried."""

_TOKENS_AT_ONCE = 32768
"""Tokens of samples that are measured in one step at most."""
_OWN_ENGINE_ARGUMENTS = {
    "model", "additional_config", "enable_chunked_prefill", "enable_prefix_caching",
    "enforce_eager", "max_model_len", "max_num_batched_tokens", "max_num_seqs",
}  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """What a run is to do, checked as far as it can be without an engine.

    Attributes:
        model: folder or name.
        weights: digest of its weights.
        options: scorer, chunk, window, sinks and group size.
        samples: texts for the statistics.
        held: texts for measuring, none of them among the former; empty without measuring.
        description: of the texts.
        seed: of whatever was drawn.
        ratios: at which budgets are measured.
        compared: ratios at which scorers are compared, where several are tried.
        measure_time_s: for all ratios and scorers.
        engine: keyword arguments of `vllm.LLM`.
        out: file of the profile.
    """

    model: str
    weights: str
    options: CompressionOptions
    samples: tuple[Sample, ...]
    held: tuple[Sample, ...]
    description: str
    seed: int
    ratios: tuple[float, ...]
    compared: tuple[float, ...]
    measure_time_s: float
    engine: dict[str, Any]
    out: Path

    @property
    def name(self) -> str:
        """The model's name: on the Hub, or of its folder."""
        folder = Path(self.model)
        return folder.resolve().name if folder.is_dir() else self.model

    @property
    def partial(self) -> Path:
        """The file that an interrupted run leaves."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def unmeasured(self) -> Path:
        """A profile without all of the budgets, which is left where measuring them fails."""
        return self.out.with_name(self.out.name + ".unmeasured")


def prepare(
    args: argparse.Namespace, tell: Callable[[str], None] = lambda line: None
) -> Calibration:
    """Read the texts, and check everything that can be checked.

    Args:
        args: of the command.
        tell: called with a line about texts that were skipped, and about budgets that are not
            measured, where nobody asked for that.

    Raises:
        TangramError: something that cannot be calibrated; names the option.
    """
    recall = is_bundled(args.model)
    model = str(bundled_model()) if recall else args.model
    given_engine = _engine_arguments(args)
    revision = given_engine.get("revision")
    config = read_config(model, revision)
    served = served_config(config, given_engine)
    refuse_model(args.model, ModelFacts.from_config(served, given_engine))
    identity = ModelIdentity.from_config(served)
    dtype = given_engine.setdefault("dtype", "float32" if recall and is_cpu_build() else "auto")
    group_size = args.page_group_size
    if recall and group_size is None:
        group_size = RECALL_GROUP_SIZE
    options = CompressionOptions.from_mapping(
        {
            "page_group_size": group_size,
            "compression_chunk_size": args.compression_chunk_size,
            "compression_window_size": args.compression_window_size,
            "compression_n_sink_tokens": args.compression_n_sink_tokens,
            "compression_scorer": args.compression_scorer,
            "compression_scorer_parameters": args.compression_scorer_parameters,
        }
    )
    itemsize = ITEMSIZE_BYTES[dtype if dtype in ITEMSIZE_BYTES else served_dtype(config)]
    # The layout of any scorer without needs of its own: statistics are what is to be made.
    plain = replace(without_profile(options), compression_ratio=1.0)
    layout = make_plan(plain, identity, itemsize).geometry
    options.scorer.check_inputs(
        layout.window_size_tokens, (QUERY_MEAN, QUERY_COVARIANCE, ROW_WEIGHTS, ROPE_FREQUENCIES)
    )
    options.scorer.check_model(identity.num_layers, identity.hidden_size, identity.num_kv_heads)
    check_output("--out", args.out, args.data)
    name, tokenizer_options = tokenizer_arguments(given_engine, model)
    tokenizer = load_tokenizer(name, **tokenizer_options)
    samples, description = load_samples(
        args.data,
        tokenizer,
        count=args.samples,
        max_tokens=_max_tokens(args.max_tokens, config, given_engine, layout),
        chunk_size_tokens=layout.chunk_size_tokens,
        seed=args.seed,
        tell=tell,
    )
    allowed = measure_ratios(args.measure_ratios, layout)
    ratios = allowed if _measures(args) else ()
    if args.measure is None and not _measures(args):
        tell(
            "statistics alone: measuring budgets takes long on a CPU, and without it they are of "
            "level error; the same command with --measure measures them"
        )
    held = held_back(len(samples)) if ratios else ()
    measured = tuple(samples[number] for number in held)
    return Calibration(
        model=model,
        weights=weights_digest(snapshot_folder(model, revision)),
        options=options,
        samples=tuple(s for number, s in enumerate(samples) if number not in held),
        held=measured,
        description=description,
        seed=args.seed,
        ratios=ratios,
        compared=allowed or (1.0,),
        measure_time_s=args.measure_time_limit or DEFAULT_MEASURE_TIME_S * len(options.scorers),
        engine=_with_cache_memory(given_engine, samples, measured, layout),
        out=args.out,
    )


def _measures(args: argparse.Namespace) -> bool:
    """Whether budgets are measured: as told, and where nothing is, on a GPU."""
    if args.measure is not None:
        return bool(args.measure)
    return bool(args.measure_ratios or args.measure_time_limit) or not is_cpu_build()


def measure_ratios(asked: Sequence[float] | None, layout: Geometry) -> tuple[float, ...]:
    """The ratios that were asked for, or those of the default that the chunk allows.

    Raises:
        BudgetError: one that was asked for cannot be had; names the smallest that can.
    """
    allowed = []
    for ratio in asked or DEFAULT_MEASURE_RATIOS:
        try:
            allocate(
                "uniform",
                num_layers=layout.num_layers,
                num_kv_heads=layout.num_kv_heads,
                ratio=ratio,
                chunk_size_tokens=layout.chunk_size_tokens,
                page_size_rows=layout.page_size_rows,
                page_group_size=layout.page_group_size,
                n_sink_tokens=layout.n_sink_tokens,
            )
        except BudgetError:
            if asked:
                raise
            continue
        allowed.append(ratio)
    return tuple(allowed)


def _max_tokens(
    asked: int | None, config: Mapping[str, Any], engine: Mapping[str, Any], layout: Geometry
) -> int:
    """Tokens of the longest sample: as asked, or the default as far as the model goes."""
    longest = _longest(config, engine)
    # The engine that reads a sample also generates one token.
    most = asked or int(min(max(DEFAULT_MAX_TOKENS, 4 * layout.chunk_size_tokens), longest - 1))
    if not layout.chunk_size_tokens < most < longest:
        limit = "" if longest == math.inf else f", and less than the model's {longest:.0f}"
        raise ConfigurationError(
            f"--max-tokens is {most}: give more than a chunk of {layout.chunk_size_tokens} tokens "
            f"(--compression-chunk-size){limit}"
        )
    return most


def _longest(config: Mapping[str, Any], engine: Mapping[str, Any]) -> float:
    """Tokens that vLLM lets the model go to; without end where its config does not tell."""
    overrides = engine.get("hf_overrides")
    text = {**text_config(config), **(overrides if isinstance(overrides, Mapping) else {})}
    rope = {**(text.get("rope_scaling") or {}), **(text.get("rope_parameters") or {})}
    # Of all others, YaRN among them, max_position_embeddings is the length after scaling.
    scales = rope.get("rope_type", rope.get("type")) in ("linear", "dynamic", "ntk")
    factor = rope.get("factor") if scales else None
    window = text.get("sliding_window") if engine.get("disable_sliding_window") else None
    return min(text.get("max_position_embeddings") or math.inf, window or math.inf) * (factor or 1)


def _engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What was given for the engine."""
    try:
        given = json.loads(args.engine_args)
    except ValueError as error:
        raise ConfigurationError(f"--engine-args is no JSON: {error}") from error
    if not isinstance(given, dict):
        raise ConfigurationError(f"--engine-args is to be a JSON object, got {args.engine_args}")
    if own := sorted(_OWN_ENGINE_ARGUMENTS & set(given)):
        raise ConfigurationError(f"--engine-args: calibration sets {', '.join(own)}: leave it out")
    check_engine_arguments("--engine-args", given)
    flags = {"dtype": args.dtype, "gpu_memory_utilization": args.gpu_memory_utilization}
    given |= {name: value for name, value in flags.items() if value is not None}
    if _measures(args):
        try:
            refuse_options(given, "--engine-args")
        except UnsupportedError as error:
            raise UnsupportedError(
                f"{error}; or give --no-measure, which does without an engine with compression"
            ) from error
    return given


def _with_cache_memory(
    engine: dict[str, Any], samples: Sequence[Sample], held: Sequence[Sample], layout: Geometry
) -> dict[str, Any]:
    """The engine's arguments, with a KV cache no larger than the samples need, unless sized."""
    if {"kv_cache_memory_bytes", "gpu_memory_utilization"} & set(engine):
        return engine
    together = min(_TOKENS_AT_ONCE, sum(len(s.token_ids) for s in held))
    tokens = max(together, *(len(s.token_ids) for s in samples)) + 2 * layout.chunk_size_tokens
    return {**engine, "kv_cache_memory_bytes": layout.full_bytes(tokens) * 3 // 2}
