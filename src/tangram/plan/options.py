"""What a user can ask for: flags of `vllm serve`, keyword arguments of `tangram.LLM`, one dict."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from tangram.budgets import LEVELS
from tangram.errors import ConfigurationError, ProfileError, ScorerError
from tangram.scorers import (
    AUTO_SCORER,
    AUTO_SCORERS,
    UNCALIBRATED_SCORER,
    get_scorer,
    is_auto,
    scorer_names,
    with_weights,
)
from tangram.scorers.base import Scorer

if TYPE_CHECKING:
    from tangram.profile import Profile

CONFIG_KEY = "tangram"
"""Key of vLLM's `additional_config` under which the options travel to every process."""

NO_PROFILE = "none"
AUTO_PROFILE = "auto"
"""A profile from the cache, or one that is calibrated first; what an engine takes by itself."""


@dataclass(frozen=True)
class CompressionOptions:
    """Options of compression; names are those of the flags, with underscores.

    Attributes:
        enable_compression: whether the KV cache is compressed at all.
        compression_ratio: share of all rows that is kept, in (0, 1]; not what is removed.
        page_group_size: H_p, KV heads that share a budget and a page; when absent 4, and less where
            all heads of a layer would share a budget.
        compression_chunk_size: C, tokens that are sealed together; a multiple of 16.
        compression_window_size: W, tokens before a boundary that stay raw until the next one.
        compression_n_sink_tokens: S, tokens at the start that every head keeps.
        compression_scorer: name of the scorer, or `auto` for the profile's; without a profile
            that is `UNCALIBRATED_SCORER`. A profile that is calibrated for `auto` is of the best of
            `AUTO_SCORERS`.
        compression_scorer_parameters: of its parameters those that are not to have their defaults,
            JSON values by name; None for none.
        compression_level: rule that turns a profile into budgets; when absent `measured` if the
            profile holds measured budgets, `error` with another profile, `uniform` without one.
        compression_profile: file that calibration wrote, `none` for uniform budgets, or `auto` for
            one from the cache, which is calibrated before the start if it is not there. An engine
            takes None for `auto`; a plan is made of what it has come to.
        compression_drift_sample: of so many sealed chunks one is compared with the profile.
        compression_admission: whether waiting requests whose history is cached go first.
    """

    enable_compression: bool = True
    compression_ratio: float = 0.3
    page_group_size: int | None = None
    compression_chunk_size: int = 256
    compression_window_size: int = 32
    compression_n_sink_tokens: int = 4
    compression_scorer: str = AUTO_SCORER
    compression_scorer_parameters: Mapping[str, Any] | None = None
    compression_level: str | None = None
    compression_profile: str | None = None
    compression_drift_sample: int = 0
    compression_admission: bool = True

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> CompressionOptions:
        """Options from a dict; absent ones, and those that are None, take their defaults.

        Raises:
            ConfigurationError: a name or a value that is not known, or no dict at all.
        """
        if not isinstance(given, Mapping):
            raise ConfigurationError(
                f"{CONFIG_KEY} of --additional-config is {given!r}: give an object with options of "
                'compression, {"compression_ratio": 0.3}, or leave it out'
            )
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ConfigurationError(
                f"unknown compression option {', '.join(unknown)}: known are "
                f"{', '.join(sorted(known))}"
            )
        values = {name: value for name, value in given.items() if value is not None}
        if (parameters := values.get("compression_scorer_parameters")) is not None:
            values["compression_scorer_parameters"] = json_parameters(parameters) or None
        if "compression_scorer" in values:
            name, parameters = with_weights(
                values["compression_scorer"], values.get("compression_scorer_parameters") or {}
            )
            values["compression_scorer"] = name
            values["compression_scorer_parameters"] = parameters or None
        options = cls(**values)
        options.check()
        return options

    def to_mapping(self) -> dict[str, Any]:
        """The options as a JSON object."""
        return asdict(self)

    @property
    def scorer(self) -> Scorer:
        """The scorer, with its parameters; of `auto` what it stands for without a profile.

        Raises:
            ScorerError: an unknown scorer or parameter, or a bad value.
        """
        name = UNCALIBRATED_SCORER if self.is_auto else self.compression_scorer
        return get_scorer(name, **(self.compression_scorer_parameters or {}))

    @property
    def is_auto(self) -> bool:
        """Whether the scorer is left to calibration."""
        return is_auto(self.compression_scorer)

    @property
    def scorers(self) -> tuple[Scorer, ...]:
        """What a profile for these options may be of: the scorer, or the candidates of `auto`."""
        return tuple(map(get_scorer, AUTO_SCORERS)) if self.is_auto else (self.scorer,)

    def with_scorer_of(self, profile: Profile | None) -> CompressionOptions:
        """The options with the scorer that `auto` stands for beside this profile, or none.

        Raises:
            ProfileError: the profile is of a scorer that is not installed, or cannot be had.
        """
        if not self.is_auto:
            return self
        scorer = self.scorer
        if profile is not None:
            try:
                scorer = get_scorer(profile.scorer_name, **profile.scorer_parameters)
            except ScorerError as error:
                raise ProfileError(
                    f"--compression-scorer {AUTO_SCORER} takes the profile's scorer, which cannot "
                    f"be had: {error}"
                ) from error
        return replace(
            self,
            compression_scorer=scorer.name,
            compression_scorer_parameters=scorer.changed_parameters() or None,
        )

    def check(self) -> None:
        """Raise ConfigurationError for a value that no model could be served with."""
        for name in ("page_group_size", "compression_chunk_size", "compression_window_size",
                     "compression_n_sink_tokens", "compression_drift_sample"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigurationError(f"{flag(name)} is {value!r}: give a whole number")
        for name in ("enable_compression", "compression_admission"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigurationError(f"{flag(name)} is {value!r}: give true or false")
        ratio = self.compression_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
            raise ConfigurationError(
                f"--compression-ratio is {self.compression_ratio!r}: give the share of rows to "
                "keep, above 0 and at most 1"
            )
        if self.page_group_size is not None and self.page_group_size < 1:
            raise ConfigurationError(f"--page-group-size is {self.page_group_size}: give 1 or more")
        if self.compression_drift_sample < 0:
            raise ConfigurationError(
                f"--compression-drift-sample is {self.compression_drift_sample}: give 1 or more "
                "sealed chunks, one of which is sampled, or 0 for none"
            )
        if self.compression_profile is not None and not isinstance(self.compression_profile, str):
            raise ConfigurationError(
                f"--compression-profile is {self.compression_profile!r}: give a file, auto or none"
            )
        if self.compression_profile == "":
            raise ConfigurationError(
                "--compression-profile is empty: give a file, auto or none, or leave it out"
            )
        if self.compression_level is not None and self.compression_level not in LEVELS:
            raise ConfigurationError(
                f"--compression-level is {self.compression_level!r}: choose one of "
                f"{', '.join(LEVELS)}"
            )
        if self.is_auto and self.compression_scorer_parameters:
            raise ConfigurationError(
                f"{flag('compression_scorer_parameters')} is given, and "
                f"{flag('compression_scorer')} is {AUTO_SCORER}, which takes the profile's scorer "
                "with the parameters that it was calibrated with: name the scorer, or leave the "
                "parameters out"
            )
        self.scorer.check_window(self.compression_window_size)


_HELP = {
    "enable_compression": "Compress the KV cache: every head keeps its own share of each chunk.",
    "compression_ratio": "Share of all rows that is KEPT, above 0 and at most 1 (default: 0.3). "
    "kvpress counts what is removed: its 0.75 is 0.25 here.",
    "page_group_size": "KV heads that share a budget and a page (default: 4, or what fits).",
    "compression_chunk_size": "Tokens that are sealed together (default: 256).",
    "compression_window_size": "Tokens before a chunk boundary that stay raw until the next "
    "boundary (default: 32).",
    "compression_n_sink_tokens": "Tokens at the start that every head keeps (default: 4).",
    "compression_scorer": "Which tokens are worth keeping: {names}, a registered one, or "
    f"{AUTO_SCORER}, the profile's, which calibration chose among {', '.join(AUTO_SCORERS)}; those "
    "with published weights take their file after a colon, kvzap:FILE "
    f"(default: {AUTO_SCORER}).",
    "compression_scorer_parameters": "The scorer's parameters, such as "
    "'{{\"kernel_size\": 7}}' (default: its own).",
    "compression_level": "Rule that turns a profile into budgets (default: measured where the "
    "profile has measured budgets, error with another profile, uniform without).",
    "compression_profile": "Calibration file of this model and scorer; auto: one from the cache, "
    "calibrated first if it is not there (default); none: uniform budgets, which lose answers.",
    "compression_drift_sample": "Compare one of every N sealed chunks with the profile, to see "
    "whether calibration covers the traffic (default: 0, none).",
    "compression_admission": "Admit waiting requests whose history is cached before others, within "
    "bounds, rather than first come, first served (default: on).",
}
_TYPES = {
    "compression_ratio": float,
    "page_group_size": int,
    "compression_chunk_size": int,
    "compression_window_size": int,
    "compression_n_sink_tokens": int,
    "compression_drift_sample": int,
}
_SWITCHES = ("compression_admission",)
"""Options that are on, and whose flag takes `--no-` before its name."""


def option_names() -> set[str]:
    """Of all options of compression."""
    return set(_HELP)


def flag(name: str, value: object = None) -> str:
    """The flag of an option, of one that is turned off that which does so."""
    return ("--no-" if value is False else "--") + name.replace("_", "-")


def flag_names() -> set[str]:
    """The flags of all options, those that turn one off too."""
    return {flag(name) for name in _HELP} | {flag(name, False) for name in _SWITCHES}


def flag_value(value: object) -> str:
    """The value of an option as its flag takes it."""
    return json.dumps(value) if isinstance(value, Mapping) else str(value)


def json_parameters(given: object) -> dict[str, Any]:
    """Parameters of a scorer as JSON gives them back.

    Args:
        given: a mapping, or a JSON object's text, as flags have it.

    Raises:
        ConfigurationError: something else.
    """
    try:
        text = json.dumps(dict(given)) if isinstance(given, Mapping) else given
        plain = json.loads(text)  # type: ignore[arg-type] # what is no text is a TypeError
        json.dumps(plain, allow_nan=False)
    except (TypeError, ValueError):
        plain = None
    if not isinstance(plain, dict):
        raise ConfigurationError(
            f"{flag('compression_scorer_parameters')} is {given!r}: give a JSON object with the "
            'scorer\'s parameters, {"kernel_size": 7}, or leave it out'
        )
    return plain


def compression_arguments(options: CompressionOptions) -> list[str]:
    """The options as flags of `vllm serve`."""
    arguments = ["--enable-compression"]
    given = {name: value for name, value in options.to_mapping().items() if value is not None}
    for name, value in given.items():
        if name in _SWITCHES:
            arguments += [] if value else [flag(name, value)]
        elif name != "enable_compression":
            arguments += [flag(name), flag_value(value)]
    return arguments


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags to a parser; those not given parse to None."""
    group = parser.add_argument_group("KV cache compression (tangram)")
    for name, text in _HELP.items():
        text = text.format(names=", ".join(scorer_names(third_party=False)))
        if name == "enable_compression":
            group.add_argument(flag(name), action="store_true", default=None, help=text)
        elif name in _SWITCHES:
            negatable = argparse.BooleanOptionalAction
            group.add_argument(flag(name), action=negatable, default=None, help=text)
        elif name == "compression_level":
            group.add_argument(flag(name), default=None, help=text, metavar="|".join(LEVELS))
        else:
            group.add_argument(flag(name), default=None, type=_TYPES.get(name, str), help=text)


def take_flags_whole(parser: argparse.ArgumentParser) -> None:
    """Keep the flags from being abbreviated, and from making abbreviations of others ambiguous."""
    ours = flag_names()
    find: Any = getattr(parser, "_get_option_tuples", None)
    if find is None:  # a Python that has it by another name
        return

    def find_others(text: str) -> list:
        return [found for found in find(text) if found[1] not in ours]

    parser._get_option_tuples = find_others  # type: ignore[method-assign, assignment]


def options_from_flags(args: argparse.Namespace) -> dict[str, Any] | None:
    """The options that were given as flags; None without --enable-compression.

    Raises:
        ConfigurationError: a flag of compression without --enable-compression, which would be
            served uncompressed without a word.
    """
    given = {name: getattr(args, name, None) for name in _HELP}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return None
    if not given.get("enable_compression"):
        raise ConfigurationError(
            f"{flag(*next(iter(given.items())))} is given without --enable-compression: add "
            "--enable-compression, or leave it out"
        )
    return given
