"""`tangram serve`: vLLM's OpenAI server with compression on."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from tangram.cli.mistakes import check_arguments
from tangram.cli.plan import compression_options
from tangram.errors import ProfileError
from tangram.installed import is_cpu_build, vllm_command
from tangram.plan.cached import calibrate_arguments, without_profile
from tangram.plan.compression_plan import make_plan
from tangram.plan.model_facts import ModelFacts, served_config
from tangram.plan.models import (
    RECALL,
    bundled_model,
    bundled_options,
    config_at_hand,
    is_bundled,
)
from tangram.plan.options import (
    AUTO_PROFILE,
    NO_PROFILE,
    add_flags,
    flag,
    option_names,
)
from tangram.plan.supported import refuse_model, refuse_options
from tangram.profile import ModelIdentity, Profile
from tangram.scorers import is_auto

_ENABLE = "--enable-compression"
_CACHE_MEMORY = "--kv-cache-memory-bytes"
_RECALL_CACHE_BYTES = 512 << 20
_ENGINE_FLAGS: Mapping[str, tuple] = {
    "attention_backend": (str,),
    "block_size": (str,),
    "convert": (str,),
    "decode_context_parallel_size": (int, "-dcp"),
    "dtype": (str,),
    "kv_cache_dtype": (str,),
    "kv_offloading_size": (float,),
    "kv_transfer_config": (str,),
    "pipeline_parallel_size": (int, "-pp"),
    "prefill_context_parallel_size": (int, "-pcp"),
    "revision": (str,),
    "runner": (str,),
    "spec_method": (str,),
    "speculative_config": (str, "-sc"),
    "tensor_parallel_size": (int, "-tp"),
    "ubatch_size": (int,),
    "worker_extension_cls": (str,),
}
"""Type and short form of vLLM's options that are refused, or change what is known of a model."""
_ENGINE_SWITCHES = ("disable_hybrid_kv_cache_manager", "disable_sliding_window", "enable_dbo")
_OTHER_CONFIGS = {"--config-format", "--hf-config-path", "--hf-overrides"}
"""Options with which a model's config is not the one of its folder."""

_DESCRIPTION = f"""Serve a model with vLLM's OpenAI server and KV cache compression on.

Everything is handed on to 'vllm serve' as it is, with {_ENABLE} added.
MODEL comes first. Without one, or for '{RECALL}', the bundled recall model is served under
that name, with settings that suit it; any of them can be given to have another.
"""
_USAGE = "tangram serve [MODEL] [options of vllm serve]"
_EPILOG = "vLLM's own options: tangram serve --help=all"


def run(argv: Sequence[str]) -> int:
    """Become vLLM's server, so that signals and the exit code are its own."""
    if argv and argv[0] in ("-h", "--help"):
        _parser().print_help()
        return 0
    arguments = serve_arguments(argv)
    command = vllm_command("serve", *arguments)
    flags = _flags(argv)
    if not {"--help", "-h"} & flags:
        check_arguments(_spelled(argv), flags)
    check_options(arguments)
    sys.stdout.flush()
    os.execve(command[0], command, {**os.environ, **_environment(argv)})
    raise AssertionError("unreachable")


def serve_arguments(argv: Sequence[str]) -> list[str]:
    """Arguments of `vllm serve`: what was given, compression, and what the bundled model needs."""
    given = list(argv)
    enable = [] if _ENABLE in _flags(given) else [_ENABLE]
    if _names_another_model(given):
        return [*given, *enable]
    if given and is_bundled(given[0]):
        given = given[1:]
    return [str(bundled_model()), *given, *enable, *_recall_defaults(given, os.environ)]


def check_options(arguments: Sequence[str]) -> None:
    """Refuse in one line, before vLLM is loaded, what the engine would refuse.

    What depends on the model is looked at where the model's config is here. Nothing but the flags
    of vLLM is, where options come from elsewhere too.

    Raises:
        TangramError: names the option and the remedy.
    """
    engine = engine_arguments(arguments)
    refuse_options(engine)
    if {"--config", "--additional-config"} & _flags(arguments):
        return
    parser = argparse.ArgumentParser(
        prog="tangram serve", usage=_USAGE, add_help=False, allow_abbrev=False
    )
    add_flags(parser)
    options = compression_options(parser.parse_known_args(_spelled(arguments))[0])
    named = options.scorer
    asked = (options.compression_profile or AUTO_PROFILE).lower()
    if asked == AUTO_PROFILE:
        calibrate_arguments()
        # What a profile that is not there yet will have to say is left to the server.
        options = without_profile(options)
    if identity := _checked_identity(arguments, engine):
        named.check_model(identity.num_layers, identity.hidden_size, identity.num_kv_heads)
        make_plan(options, identity, itemsize_bytes=2)
    elif asked not in (AUTO_PROFILE, NO_PROFILE):
        profile = Profile.load(str(options.compression_profile))
        scorer = options.with_scorer_of(profile).scorer
        profile.check(
            model=profile.model, scorer_name=scorer.name, scorer_parameters=scorer.identity()
        )


def engine_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """Those of the arguments of `vllm serve` that decide what can be served, as vLLM names them.

    Of an option that takes JSON, or is given in parts (`--speculative-config.method ngram`), only
    that it is there is told.
    """
    parser = argparse.ArgumentParser(
        prog="tangram serve", usage=_USAGE, add_help=False, allow_abbrev=False
    )
    for name, (kind, *short) in _ENGINE_FLAGS.items():
        parser.add_argument(flag(name), *short, type=kind)
    for name in _ENGINE_SWITCHES:
        parser.add_argument(flag(name), action=argparse.BooleanOptionalAction)
    whole = [re.sub(r"^(--?[\w-]+)\.[^=]*", r"\1", argument) for argument in _spelled(arguments)]
    known = vars(parser.parse_known_args(whole)[0])
    return {name: value for name, value in known.items() if value is not None}


def _checked_identity(arguments: Sequence[str], engine: Mapping[str, Any]) -> ModelIdentity | None:
    """The model whose config is here; None where only vLLM knows what it will serve.

    Raises:
        UnsupportedError: a model that compression does not serve.
    """
    flags = _flags(arguments)
    if not arguments or arguments[0].startswith("-") or flags & _OTHER_CONFIGS:
        return None
    found = config_at_hand(arguments[0], engine.get("revision"))
    if found is None:
        return None
    config = served_config(found, engine)
    refuse_model(arguments[0], ModelFacts.from_config(config, engine))
    try:
        return ModelIdentity.from_config(config)
    except ProfileError:
        return None  # vLLM may know the sizes by other names.


def _recall_defaults(given: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Settings for the bundled model, without those that are given."""
    flags = _flags(given)
    defaults: dict[str, str | None] = {
        "--served-model-name": RECALL,
        "--enforce-eager": None,
    }
    if is_cpu_build():
        defaults["--dtype"] = "float32"
    if "VLLM_CPU_KVCACHE_SPACE" not in environment and "--gpu-memory-utilization" not in flags:
        defaults[_CACHE_MEMORY] = str(_RECALL_CACHE_BYTES)
    given_options = {name for name in option_names() if flag(name) in flags}
    if _leaves_the_scorer(given):
        given_options.discard("compression_scorer")
    for name, option in bundled_options(given_options).items():
        defaults[flag(name)] = str(option)
    arguments: list[str] = []
    for argument, value in defaults.items():
        if not {argument, argument.replace("--", "--no-", 1)} & flags:
            arguments += [argument] if value is None else [argument, value]
    return arguments


def _leaves_the_scorer(given: Sequence[str]) -> bool:
    """Whether the scorer is to be the profile's in so many words."""
    parser = argparse.ArgumentParser(
        prog="tangram serve", usage=_USAGE, add_help=False, allow_abbrev=False
    )
    parser.add_argument(flag("compression_scorer"))
    return is_auto(parser.parse_known_args(_spelled(given))[0].compression_scorer)


def _environment(argv: Sequence[str]) -> dict[str, str]:
    """The bundled model is a folder: nothing is to be asked of the network for it."""
    if _names_another_model(argv) or "HF_HUB_OFFLINE" in os.environ:
        return {}
    return {"HF_HUB_OFFLINE": "1"}


def _names_another_model(given: Sequence[str]) -> bool:
    """Whether what is served is not the bundled model."""
    # A later word may be the value of an option, so only the first can be taken for a model.
    if given and not given[0].startswith("-"):
        return not is_bundled(given[0])
    # vLLM's own help, and the other places that it takes a model from.
    return bool(_flags(given) & {"--model", "--config", "--help", "-h"})


def _flags(given: Sequence[str]) -> set[str]:
    """The options among the arguments, spelled as in the documentation."""
    return {
        re.split("[=.]", argument)[0].replace("_", "-")
        for argument in given
        if argument.startswith("-")
    }


def _spelled(given: Sequence[str]) -> list[str]:
    """The arguments with options spelled as in the documentation."""
    parts = [(argument, *argument.partition("=")) for argument in given]
    return [
        name.replace("_", "-") + equals + value if argument.startswith("--") else argument
        for argument, name, equals, value in parts
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tangram serve",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="as for vllm serve")
    add_flags(parser)
    return parser
