"""The profile in memory: who it was made for, how, and the raw statistics as arrays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from tangram.errors import ProfileError, ProfileMismatchError
from tangram.printable import shown
from tangram.profile import store
from tangram.profile.checks import MOST_TOKENS, json_object, rising_numbers, text, whole_number
from tangram.profile.identity import ModelIdentity
from tangram.profile.statistics import (
    QUERY_COVARIANCE,
    QUERY_MEAN,
    ROPE_FREQUENCIES,
    ROW_WEIGHTS,
    SAMPLE_AXES,
    checked,
    known_shape,
    stored_dtype,
)
from tangram.version import VERSION

_CHUNK_FIELDS = ("chunk_size_tokens", "window_size_tokens", "n_sink_tokens")


@dataclass(frozen=True, eq=False, kw_only=True)
class Profile:
    """What calibration found, raw, so that any ratio, chunk size and group size can be asked of it.

    Every array is optional; what needs one that is missing says so (`require`). Arrays of other
    names are kept as they are. Arrays are copied and cannot be written to.

    Attributes:
        model: the network that the statistics belong to.
        scorer_name: scorer whose rows the statistics are about.
        scorer_parameters: all its parameters (JSON values).
        chunk_size_tokens: C that calibration ran with.
        window_size_tokens: W that calibration ran with.
        n_sink_tokens: S that calibration ran with.
        ratios: grid of the threshold shares, increasing, in (0, 1].
        shares: grid of the curves, increasing, from 0 to 1.
        data: what was calibrated on: `sha256`, `n_samples`, `description`.
        seed: seed of whatever was drawn.
        extra: further JSON values, such as what a search over budgets found.
        arrays: name -> array.
            "threshold_share/crosslayer", "threshold_share/perlayer": [ratios, samples, layers,
            kv_heads] float32, share of the head's tokens above the threshold over all heads (of
            the model, of the layer).
            "mass_curve": [samples, layers, kv_heads, shares] float32, attention mass of later
            queries that the scorer's top rows still hold.
            "error_curve": same shape, relative error of the head's contribution to the residual
            stream.
            "query_mean": [layers, query_heads, head_size] float32, before RoPE.
            "query_covariance": [layers, query_heads, head_size, head_size] float32, before RoPE.
            "row_weights": [layers, kv_heads, 2 * head_size + 4] float32, of the scorer `learned`.
            "rope_frequencies": [rotary dimensions / 2] float64, radians per position.
        tangram_version: version that wrote it.

    Raises:
        ProfileError: a field of the wrong type or out of its range, or a grid or an array that
            does not fit the rest.

    Source: docs/design.md section 5.
    """

    model: ModelIdentity
    scorer_name: str
    scorer_parameters: Mapping[str, Any] = field(default_factory=dict)
    chunk_size_tokens: int
    window_size_tokens: int
    n_sink_tokens: int
    ratios: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    extra: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    tangram_version: str = VERSION

    def __post_init__(self) -> None:
        for name in ("scorer_name", "tangram_version"):
            text(f"profile: {name}", getattr(self, name))
        whole_number("profile: seed", self.seed, -(1 << 64), 1 << 64)
        for name in ("ratios", "shares"):
            grid = rising_numbers(f"profile: {name}", getattr(self, name))
            object.__setattr__(self, name, grid)
        if self.ratios and not (self.ratios[0] > 0 and self.ratios[-1] <= 1):
            raise ProfileError(f"profile: ratios must lie in (0, 1], got {shown(self.ratios)}")
        if self.shares and (self.shares[0], self.shares[-1]) != (0.0, 1.0):
            raise ProfileError(f"profile: shares must run from 0 to 1, got {shown(self.shares)}")
        self._check_chunk()
        arrays = {name: self._checked(name, array) for name, array in self.arrays.items()}
        object.__setattr__(self, "arrays", MappingProxyType(arrays))
        for name in ("scorer_parameters", "data", "extra"):
            plain = json_object(f"profile: {name}", getattr(self, name))
            object.__setattr__(self, name, MappingProxyType(plain))

    def _check_chunk(self) -> None:
        for name in _CHUNK_FIELDS:
            size = getattr(self, name)
            whole_number(f"profile: {name}", size, -MOST_TOKENS, MOST_TOKENS)
            if size < (name == "chunk_size_tokens"):
                raise ProfileError(f"profile: {name} cannot be {size}")
        if self.window_size_tokens + self.n_sink_tokens > self.chunk_size_tokens:
            raise ProfileError(
                f"profile: a window of {self.window_size_tokens} tokens and {self.n_sink_tokens} "
                f"sinks do not fit a chunk of {self.chunk_size_tokens}"
            )

    def _check_samples(self) -> None:
        """All arrays over samples are over the same ones, as many as `data` tells of."""
        counts = {
            name: array.shape[SAMPLE_AXES[name]]
            for name, array in self.arrays.items()
            if name in SAMPLE_AXES
        }
        if "n_samples" in self.data:
            number = whole_number("profile: data's n_samples", self.data["n_samples"])
            counts = {"data's n_samples": number, **counts}
        if len(set(counts.values())) > 1:
            raise ProfileError(f"profile: numbers of samples differ: {counts}")

    def _shape(self, name: str) -> tuple[int | None, ...] | None:
        return known_shape(name, self.model, len(self.ratios), len(self.shares))

    def _checked(self, name: str, array: np.ndarray) -> np.ndarray:
        array = np.array(array, order="C")
        if (shape := self._shape(name)) is not None:
            array = checked(name, array, shape)
        array.setflags(write=False)
        return array

    def require(self, name: str, level: str) -> np.ndarray:
        """The array of this name.

        Raises:
            ProfileError: the profile lacks it; names the level that needs it, and the array.
        """
        if name not in self.arrays:
            raise ProfileError(
                f"level {level!r} needs the array {name!r}, which this profile lacks (it has "
                f"{sorted(self.arrays) or 'none'}): calibrate again with it, or choose another "
                "--compression-level"
            )
        return self.arrays[name]

    def layer_statistics(self, layer: int) -> dict[str, np.ndarray]:
        """What a scorer may ask about one layer, as far as the profile has it.

        Returns:
            "query_mean" [query_heads, head_size], "query_covariance" [query_heads, head_size,
            head_size], "row_weights" [kv_heads, 2 * head_size + 4], "rope_frequencies" [rotary
            dimensions / 2].

        Raises:
            ProfileError: no such layer.
        """
        if not 0 <= layer < self.model.num_layers:
            raise ProfileError(f"profile: no layer {layer} among {self.model.num_layers}")
        per_layer = (QUERY_MEAN, QUERY_COVARIANCE, ROW_WEIGHTS)
        found = {name: self.arrays[name][layer] for name in per_layer if name in self.arrays}
        if ROPE_FREQUENCIES in self.arrays:
            found[ROPE_FREQUENCIES] = self.arrays[ROPE_FREQUENCIES]
        return found

    def check(
        self, *, model: ModelIdentity, scorer_name: str, scorer_parameters: Mapping[str, Any]
    ) -> None:
        """Return only if the profile is about this model and this scorer.

        Chunk, window and sinks may differ: the statistics are shares, asked by interpolation.

        Raises:
            ProfileMismatchError: it is not; names what the profile has and what the server has.
        """
        differing = self.model.differences(model)
        if differing:
            raise ProfileMismatchError(
                f"the profile is of another model (differing: {', '.join(differing)}): the profile "
                f"has {self.model}, the server has {model}; give the --compression-profile of "
                "this model, or none"
            )
        mine = scorer_name, json_object("profile: scorer_parameters", scorer_parameters)
        theirs = self.scorer_name, dict(self.scorer_parameters)
        if mine != theirs:
            what, option = "another scorer", "--compression-scorer of the profile"
            if mine[0] == theirs[0]:
                what = "other parameters of the scorer"
                option = f"--compression-scorer-parameters '{json.dumps(theirs[1])}'"
            raise ProfileMismatchError(
                f"the profile is of {what}: the profile has {_scorer(*theirs)}, the server has "
                f"{_scorer(*mine)}; give the --compression-profile of this scorer, or none, or the "
                f"{option}"
            )

    def save(self, path: str | Path) -> None:
        """Write the file; the same profile always gives the same bytes.

        Raises:
            ProfileError: the folder cannot be written to.
        """
        header = {
            "tangram_version": self.tangram_version,
            "model": self.model.to_dict(),
            "scorer": {"name": self.scorer_name, "parameters": dict(self.scorer_parameters)},
            "chunk": {name: getattr(self, name) for name in _CHUNK_FIELDS},
            "ratios": list(self.ratios),
            "shares": list(self.shares),
            "data": dict(self.data),
            "seed": self.seed,
            "extra": dict(self.extra),
        }
        store.write(Path(path), header, self.arrays)

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Read a file that `save` wrote.

        Raises:
            ProfileError: the file is missing, truncated, damaged, of a newer schema, or not a
                profile; names the path.
        """
        header, arrays = store.read(Path(path))
        try:
            return cls._of_file(header, arrays)
        except KeyError as error:
            reason = f"it lacks {error}"
        except (TypeError, ProfileError) as error:
            reason = str(error)
        raise ProfileError(
            f"{path}: its header does not describe a profile: {reason}: {store.REMEDY}"
        )

    @classmethod
    def _of_file(cls, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Profile:
        profile = cls(
            model=ModelIdentity(**header["model"]),
            scorer_name=header["scorer"]["name"],
            scorer_parameters=header["scorer"]["parameters"],
            **{name: header["chunk"][name] for name in _CHUNK_FIELDS},
            ratios=header["ratios"],
            shares=header["shares"],
            data=header["data"],
            seed=header["seed"],
            extra=header["extra"],
            arrays=arrays,
            tangram_version=header["tangram_version"],
        )
        for name, array in arrays.items():
            if profile._shape(name) is not None and array.dtype != stored_dtype(name):
                raise ProfileError(f"{name} must be {stored_dtype(name)}, got {array.dtype}")
        profile._check_samples()
        return profile


def _scorer(name: str, parameters: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={v}' for k, v in sorted(parameters.items()))})"
