"""Models by name: the bundled one, and the config of any other, without its weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tangram.bundled import recall_model_path
from tangram.errors import ConfigurationError, ProfileError
from tangram.profile.cache import snapshot_folder

RECALL = "recall"
# Not .safetensors: an engine that loads the folder would take it for weights.
PROFILE_FILE = "key_diff.profile"
RECALL_GROUP_SIZE = 1
"""Heads of the recall model that share a budget: it has 4 KV heads a layer, and groups of 4 would
leave it no budgets of its heads' own."""


def is_bundled(model: str) -> bool:
    """Whether the name stands for the bundled recall model; a path of that name goes before it."""
    return model == RECALL and not Path(model).exists()


def bundled_model() -> Path:
    """The folder of the bundled recall model.

    Raises:
        ConfigurationError: it is missing; the message names the places.
    """
    try:
        return recall_model_path()
    except FileNotFoundError as error:
        raise ConfigurationError(str(error)) from error


def bundled_profile_options() -> dict[str, str]:
    """Options that serve the bundled model with its profile and that one's scorer."""
    path = bundled_model() / PROFILE_FILE
    if not path.is_file():
        return {}
    from tangram.profile import Profile

    profile = Profile.load(path)
    return {"compression_profile": str(path), "compression_scorer": profile.scorer_name}


def bundled_options(given: Collection[str]) -> dict[str, Any]:
    """Options of compression that the bundled model is served with, without those that are given.

    Its profile and that one's scorer come together, and only where neither is given.
    """
    own: dict[str, Any] = {"page_group_size": RECALL_GROUP_SIZE}
    if not {"compression_profile", "compression_scorer"} & set(given):
        own |= bundled_profile_options()
    return {name: value for name, value in own.items() if name not in given}


def tokenizer_arguments(engine: Mapping[str, Any], model: str) -> tuple[str, dict[str, Any]]:
    """(name, options of `AutoTokenizer.from_pretrained`) of the tokenizer that an engine takes.

    Args:
        engine: its keyword arguments.
        model: folder or name.
    """
    revision = engine.get("tokenizer_revision") or engine.get("revision")
    options = {"trust_remote_code": engine.get("trust_remote_code"), "revision": revision}
    given = {name: value for name, value in options.items() if value is not None}
    return engine.get("tokenizer") or model, given


def read_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """The config of a model.

    Args:
        model: a folder, a config.json, or a name on the Hugging Face Hub.
        revision: of a model by name; its main branch when absent.

    Raises:
        ConfigurationError: there is none to be had, or it is no JSON object.
    """
    path = bundled_model() if is_bundled(model) else Path(model)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        path = _from_hub(model, revision)
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path} cannot be read as JSON: {error}: give a model's config.json or its folder"
        ) from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} holds {type(config).__name__}, expected a JSON object")
    return config


def config_at_hand(model: str, revision: str | None = None) -> dict[str, Any] | None:
    """The config of a model that is a folder, or in the Hugging Face cache; None for any other.

    Args:
        model: folder or name.
        revision: of a model by name; its main branch when absent.

    Raises:
        ConfigurationError: it is here, and no JSON object.
    """
    if not (Path(model) / "config.json").is_file():
        try:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(model, "config.json", revision=revision)
        except Exception:  # not installed, or no name that the Hub could have
            return None
        if not isinstance(found, str):
            return None
    return read_config(model, revision)


def _from_hub(model: str, revision: str | None) -> Path:
    looks_like_a_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_a_path or model.endswith(".json"):
        raise ConfigurationError(
            f"{model} is neither a folder with a config.json nor a config.json: give one, or a "
            "name on the Hugging Face Hub"
        )
    try:
        return snapshot_folder(model, revision) / "config.json"
    except ProfileError as error:
        raise ConfigurationError(
            f"{error}: give a folder with a config.json, or check the name, the revision, the "
            "network and the access token"
        ) from error
