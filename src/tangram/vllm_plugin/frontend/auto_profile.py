"""The profile of an engine that was told of none: cached, or calibrated before the start."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs

from tangram.children import child, complaint
from tangram.errors import ConfigurationError, ProfileError
from tangram.installed import is_cpu_build
from tangram.plan.cached import (
    cached_profile,
    calibrate_arguments,
    needs_profile,
    profile_problem,
    without_profile,
)
from tangram.plan.compression_plan import group_size, make_plan
from tangram.plan.options import AUTO_PROFILE, NO_PROFILE, CompressionOptions, flag_value
from tangram.profile import ModelIdentity
from tangram.profile.cache import locked, open_beside

logger = logging.getLogger("vllm.tangram")

_REMEDIES = (
    "--compression-profile FILE takes a profile that was made by hand (tangram calibrate {model} "
    "--out FILE), and --compression-profile none serves with uniform budgets, which lose answers; "
    "in Python it is compression_profile=..."
)
_FORWARDED = (
    "code_revision", "config_format", "disable_sliding_window", "download_dir", "dtype",
    "hf_config_path", "hf_overrides", "kv_cache_dtype", "load_format", "model_loader_extra_config",
    "model_impl", "quantization", "revision", "tokenizer", "tokenizer_mode", "tokenizer_revision",
    "trust_remote_code",
)  # fmt: skip
_STOPPED = 128 + signal.SIGINT


def resolve_profile(
    options: CompressionOptions, args: EngineArgs, model: ModelIdentity, itemsize_bytes: int
) -> CompressionOptions:
    """The options with a file, or none, for what `auto`, or nothing said, stands for.

    Looks into the cache for a profile of these very weights, scorer and geometry, and has one
    calibrated in a process of its own if there is none, before this process touches a device.

    Args:
        options: what was asked for.
        args: the engine's arguments.
        model: the network.
        itemsize_bytes: bytes of one element of the cache.

    Raises:
        ConfigurationError: made-up weights, no tokenizer, weights that cannot be told from
            others', or a calibration that failed; says why, and how to start all the same.
        SystemExit: SIGTERM or Ctrl-C while it was calibrated.
    """
    asked = (options.compression_profile or AUTO_PROFILE).lower()
    if asked == NO_PROFILE:
        _warn_uniform(options)
    if asked != AUTO_PROFILE:
        return options
    if not needs_profile(options):
        return replace(options, compression_profile=NO_PROFILE)
    _refuse_without(args.load_format == "dummy", "--load-format dummy makes the weights up", args)
    # What no profile mends is refused now rather than after minutes of calibration.
    make_plan(without_profile(options), model, itemsize_bytes)
    options = replace(options, page_group_size=group_size(options, model.num_kv_heads))
    try:
        path = cached_profile(options, args.model, model, args.revision)
    except ProfileError as error:
        raise ConfigurationError(
            f"no profile can be kept for {args.model}: {error}. "
            f"{_REMEDIES.format(model=args.model)}"
        ) from error
    if profile_problem(path, options, model):
        is_missing = args.skip_tokenizer_init
        _refuse_without(is_missing, "--skip-tokenizer-init leaves no tokenizer for texts", args)
        with locked(path, lambda: logger.info("waiting for another process to calibrate %s", path)):
            if problem := profile_problem(path, options, model):
                if path.exists():
                    logger.warning("%s is calibrated again, and replaced: %s", path, problem)
                arguments = [*_arguments(path, options, args), *calibrate_arguments()]
                _calibrate(path, arguments, args.model, _secrets(args))
    return replace(options, compression_profile=str(path))


def _secrets(args: EngineArgs) -> dict[str, str]:
    """Variables of the calibration's environment: a command line is seen by all."""
    return {"HF_TOKEN": args.hf_token} if isinstance(args.hf_token, str) else {}


def _refuse_without(is_missing: bool, reason: str, args: EngineArgs) -> None:
    """Raise ConfigurationError where what a calibration takes is missing."""
    if is_missing:
        raise ConfigurationError(
            f"no profile of {args.model} can be calibrated: {reason}. "
            f"{_REMEDIES.format(model=args.model)}"
        )


def _warn_uniform(options: CompressionOptions) -> None:
    if options.compression_ratio < 1:
        logger.warning(
            "--compression-profile is none: every head keeps the same share of every chunk "
            "(uniform budgets), which costs accuracy that a calibrated profile keeps"
        )


def _arguments(path: Path, options: CompressionOptions, args: EngineArgs) -> list[str]:
    """Arguments of `tangram calibrate` that make the profile of this server."""
    defaults = {field.name: getattr(EngineArgs, field.name, None) for field in fields(EngineArgs)}
    engine = {name: getattr(args, name, None) for name in _FORWARDED}
    # vLLM has filled in the model's own tokenizer by now.
    defaults["tokenizer"] = args.model
    engine = {n: value for n, value in engine.items() if value and value != defaults.get(n)}
    try:
        given = json.dumps(engine)
    except TypeError as error:
        raise ConfigurationError(
            f"a profile cannot be calibrated with the engine's arguments {engine}, which are no "
            f"JSON. {_REMEDIES.format(model=args.model)}"
        ) from error
    return [
        args.model,
        "--out", str(path),
        "--compression-scorer", options.compression_scorer,
        "--compression-scorer-parameters", flag_value(options.compression_scorer_parameters or {}),
        "--compression-chunk-size", str(options.compression_chunk_size),
        "--compression-window-size", str(options.compression_window_size),
        "--compression-n-sink-tokens", str(options.compression_n_sink_tokens),
        "--page-group-size", str(options.page_group_size),
        "--engine-args", given,
    ]  # fmt: skip


def _calibrate(
    path: Path, arguments: list[str], model: str, environment: Mapping[str, str]
) -> None:
    """Run `tangram calibrate`; its output goes to a file, which is kept if it fails."""
    log = path.with_suffix(".log")
    logger.info(
        "no profile of %s is cached: calibrating one first on the built-in samples, once, which "
        "takes minutes (--compression-profile none starts without, with uniform budgets, which "
        "lose answers); its progress: %s",
        model,
        log,
    )
    begun = time.monotonic()
    try:
        output = open_beside(log)
    except OSError as error:
        raise ConfigurationError(
            f"{log} cannot be written ({error}): remove it. {_REMEDIES.format(model=model)}"
        ) from error
    command = [sys.executable, "-m", "tangram", "calibrate", *arguments]
    streams: Any = {"stdout": output, "stderr": subprocess.STDOUT}
    try:
        with output, child(command, environment, **streams) as process:
            code = process.wait()
    except KeyboardInterrupt:
        code = _STOPPED
    if code in (
        _STOPPED,
        -signal.SIGINT,
    ):  # Ctrl-C reaches the command as well, and may end it first
        logger.warning("calibrating was stopped: the next start goes on from there")
        raise SystemExit(_STOPPED)
    if code != 0 or not path.is_file():
        said = complaint(log.read_text(errors="replace")) or "it named no error"
        raise ConfigurationError(
            f"calibrating a profile of {model} failed (exit code {code}): {said} (its log: "
            f"{log}). {_REMEDIES.format(model=model)}"
        )
    logger.info("calibrated in %.0f s: %s", time.monotonic() - begun, path)
    if is_cpu_build() and "--measure" not in arguments:
        logger.info(
            "its budgets are of statistics alone, because measuring them takes long on a CPU: "
            "tangram calibrate %s --measure --out FILE measures, for --compression-profile FILE",
            model,
        )
    log.unlink(missing_ok=True)
