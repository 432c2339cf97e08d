"""Which file of the cache is the profile of an engine that was told of none."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

from tangram.errors import ConfigurationError, ProfileError
from tangram.installed import is_cpu_build
from tangram.plan.compression_plan import group_size
from tangram.plan.models import bundled_model, is_bundled
from tangram.plan.options import AUTO_PROFILE, NO_PROFILE, CompressionOptions
from tangram.profile import ModelIdentity, Profile
from tangram.profile.cache import cached_profile_path, snapshot_folder, weights_digest
from tangram.scorers import AUTO_SCORER, UNCALIBRATED_SCORER

ARGUMENTS_VARIABLE = "TANGRAM_CALIBRATE_ARGS"
"""Environment variable with further arguments of `tangram calibrate` for automatic profiles."""


def calibrate_arguments() -> list[str]:
    """What the environment asks of automatic calibration.

    Raises:
        ConfigurationError: it cannot be taken apart into words.
    """
    given = os.environ.get(ARGUMENTS_VARIABLE, "")
    try:
        return shlex.split(given)
    except ValueError as error:
        raise ConfigurationError(
            f"the environment variable {ARGUMENTS_VARIABLE} is {given!r}, which a shell could not "
            f"read ({error}): mend it, or unset it"
        ) from error


def needs_profile(options: CompressionOptions) -> bool:
    """Whether budgets, scores or drift are made of a profile's statistics.

    At ratio 1 every row is kept, whatever the budgets come from.
    """
    is_cut = options.compression_level is None and options.compression_ratio < 1
    return (
        is_cut
        or options.compression_level not in (None, "uniform")
        or options.compression_drift_sample > 0
        or bool(options.scorer.needs_statistics)
    )


def without_profile(options: CompressionOptions) -> CompressionOptions:
    """The options as far as no profile has a say: they can be checked before there is one."""
    return replace(
        options,
        compression_profile=NO_PROFILE,
        compression_level="uniform",
        compression_scorer=UNCALIBRATED_SCORER,
        compression_scorer_parameters=None,
        compression_drift_sample=0,
    )


def cached_profile(
    options: CompressionOptions, model: str, identity: ModelIdentity, revision: str | None = None
) -> Path:
    """The file, which need not be there, of these very weights, scorer and geometry.

    Args:
        options: what is served.
        model: folder or name of the model.
        identity: the network.
        revision: of a model by name.

    Raises:
        ProfileError: the weights cannot be told from others'.
    """
    name, parameters = options.scorer.name, options.scorer.identity()
    if options.is_auto:
        name = AUTO_SCORER
        parameters = {"scorers": [[s.name, s.identity()] for s in options.scorers]}
    return cached_profile_path(
        identity,
        weights_digest(snapshot_folder(model, revision)),
        scorer_name=name,
        scorer_parameters=parameters,
        chunk_size_tokens=options.compression_chunk_size,
        window_size_tokens=options.compression_window_size,
        n_sink_tokens=options.compression_n_sink_tokens,
        page_group_size=group_size(options, identity.num_kv_heads),
        # On a CPU budgets are not measured by default: no GPU is to take such a profile.
        recipe=[*calibrate_arguments(), *(["on a CPU"] if is_cpu_build() else [])],
    )


def profile_problem(path: Path, options: CompressionOptions, identity: ModelIdentity) -> str | None:
    """Why there is no profile of this model and scorer to take at a path; None if there is."""
    try:
        profile = Profile.load(path)
        same = [s for s in options.scorers if s.name == profile.scorer_name]
        scorer = (*same, options.scorer)[0]
        profile.check(model=identity, scorer_name=scorer.name, scorer_parameters=scorer.identity())
    except ProfileError as error:
        return str(error)
    return None


def with_cached_profile(
    options: CompressionOptions, model: str, identity: ModelIdentity
) -> tuple[CompressionOptions, str]:
    """The options with the profile that a server would take by itself, and what is said of it.

    Without a profile in the cache the plan is of uniform budgets, whose total is the same; the
    sentence says so, and is empty otherwise.
    """
    asked = (options.compression_profile or AUTO_PROFILE).lower()
    if asked != AUTO_PROFILE:
        return options, ""
    none = replace(options, compression_profile=NO_PROFILE)
    if not needs_profile(options):
        return none, ""
    try:
        path = cached_profile(options, _folder(model), identity)
        problem = profile_problem(path, options, identity)
        if problem is None:
            return replace(options, compression_profile=str(path)), ""
        reason = problem if path.exists() else "no profile of it is cached yet"
    except ProfileError as error:
        reason = f"its weights are not here ({error})"
    return (
        none,
        f"{reason}: a server would calibrate one first, with budgets of the same total; those "
        "shown are uniform, unless --compression-profile names a file.",
    )


def with_profile_at_hand(
    options: CompressionOptions, model: str, identity: ModelIdentity, option: str
) -> CompressionOptions:
    """The options with the profile that a server would take by itself, where it is cached.

    Args:
        options: what is asked for.
        model: folder or name of the model.
        identity: the network.
        option: of the command, which names a profile.

    Raises:
        ConfigurationError: uniform budgets would take the place of a profile that is not there.
    """
    options, missing = with_cached_profile(options, model, identity)
    if missing:
        name = AUTO_SCORER if options.is_auto else options.scorer.name
        out = f"{name}.profile"
        raise ConfigurationError(
            f"{option} is not given, and no profile of {model} with scorer {name} is cached: make "
            f"one with `tangram calibrate {model} --compression-scorer {name} --out {out}` and "
            f"give {option} {out}, or give {option} none for uniform budgets, which lose answers"
        )
    return options


def _folder(model: str) -> str:
    """Where a model's weights would lie, or its name on the Hub."""
    if is_bundled(model):
        return str(bundled_model())
    return str(Path(model).parent) if Path(model).is_file() else model
