"""From options, a model's identity and a profile to the one plan that every process follows.

The plan is made once, where the engine's configuration is made, and travels as JSON in vLLM's
`additional_config`. Nothing of it is decided again in the scheduler or in a worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tangram.budgets import MEASURED, allocate, default_level, floor_pages, interpolation
from tangram.errors import ConfigurationError, ProfileError
from tangram.geometry import Geometry, LayerMap, check_chunk
from tangram.plan.drift_reference import DriftReference
from tangram.plan.model_shape import ModelShape
from tangram.plan.options import CONFIG_KEY, NO_PROFILE, CompressionOptions
from tangram.profile import ModelIdentity, Profile
from tangram.scorers import get_scorer, scorer_title
from tangram.scorers.base import Scorer

PAGE_SIZE_ROWS = 16
DEFAULT_GROUP_SIZES = (4, 2)
"""Of these the first that leaves a layer two groups to choose between."""


@dataclass(frozen=True)
class CompressionPlan:
    """What is served: the layout, the scorer and where its statistics come from.

    Attributes:
        geometry: the layout of the cache.
        scorer_name: registry name of the scorer.
        level: rule that the budgets come from.
        profile_path: file of the profile, or None without one.
        ratio: share of all rows that was asked for.
        drift_sample: of so many sealed chunks one is compared with the profile; 0: none.
        scorer_parameters: of the scorer's parameters those that are not at their defaults.
        layers: places in the model of the layers that are compressed; None: all of its layers.
        weights_digest: of the file that the scorer's gates are read from; "" where it has none.
        interpolated: what measured budgets were interpolated from, in words; "" where they were
            measured for this very ratio and these sizes, and for other levels.
    """

    geometry: Geometry
    scorer_name: str
    level: str
    profile_path: str | None
    ratio: float
    drift_sample: int = 0
    scorer_parameters: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    interpolated: str = ""
    weights_digest: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal plan."""
        return {
            "geometry": self.geometry.to_json(),
            "scorer_name": self.scorer_name,
            "level": self.level,
            "profile_path": self.profile_path,
            "ratio": self.ratio,
            "drift_sample": self.drift_sample,
            "scorer_parameters": dict(self.scorer_parameters),
            "layers": None if self.layers is None else list(self.layers),
            "interpolated": self.interpolated,
            "weights_digest": self.weights_digest,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> CompressionPlan:
        """The plan that `to_json` described."""
        layers = plain.get("layers")
        made = {
            "geometry": Geometry.from_json(plain["geometry"]),
            "layers": None if layers is None else tuple(layers),
        }
        return cls(**{**plain, **made})

    @property
    def layer_map(self) -> LayerMap:
        """Which layers of the model are compressed."""
        if self.layers is None:
            return LayerMap.every(self.geometry.num_layers)
        return LayerMap(self.layers)

    @property
    def scorer(self) -> Scorer:
        """The scorer, with its parameters."""
        return get_scorer(self.scorer_name, **self.scorer_parameters)

    @property
    def scorer_title(self) -> str:
        """The scorer as people read it."""
        return scorer_title(self.scorer_name, self.scorer_parameters)

    @property
    def budgets_title(self) -> str:
        """Where the budgets come from, as people read it."""
        said = f" ({self.interpolated})" if self.interpolated else ""
        return f"{self.level} budgets{said}"

    @property
    def floor_share(self) -> float:
        """Part of the kept pages that no rule deals out: every head group has to have them."""
        geometry = self.geometry
        pages = [pages for layer in geometry.head_groups.pages for pages in layer]
        floor = floor_pages(geometry.n_sink_tokens, geometry.page_size_rows)
        return floor * len(pages) / sum(pages)

    def load_profile(self) -> Profile | None:
        """The profile, read again."""
        return Profile.load(self.profile_path) if self.profile_path else None


def group_size(options: CompressionOptions, num_kv_heads: int) -> int:
    """H_p: what was asked for, or 4, and less where all heads of a layer would share a budget.

    Raises:
        ConfigurationError: the size asked for does not divide the KV heads.
    """
    if options.page_group_size is None:
        fit = (s for s in DEFAULT_GROUP_SIZES if s < num_kv_heads and num_kv_heads % s == 0)
        return next(fit, 1)
    if num_kv_heads % options.page_group_size:
        divisors = [d for d in range(1, num_kv_heads + 1) if num_kv_heads % d == 0]
        raise ConfigurationError(
            f"--page-group-size is {options.page_group_size} and the model has {num_kv_heads} KV "
            f"heads: give a divisor of it, {', '.join(map(str, divisors))}"
        )
    return options.page_group_size


def with_scorer(options: CompressionOptions) -> CompressionOptions:
    """The options with the scorer that `auto` stands for: the profile's, if there is one.

    Raises:
        ProfileError: a profile that cannot be read.
        ScorerError: it is of a scorer that is not installed.
    """
    if not options.is_auto:
        return options
    with _named(_profile_path(options)):
        return options.with_scorer_of(_profile_of(options))


def make_plan(
    options: CompressionOptions,
    model: ModelIdentity,
    itemsize_bytes: int,
    shape: ModelShape | None = None,
) -> CompressionPlan:
    """Everything that serving the model with these options needs to know.

    Args:
        options: checked options.
        model: the model that is served, which a profile must be of.
        itemsize_bytes: bytes of one element of the cache.
        shape: layers and heads as the engine knows them; those of `model` when absent.

    Raises:
        ConfigurationError: options that do not fit the model; the message names the flag.
        BudgetError: a ratio that the model's heads cannot be cut to.
        ProfileError: a profile that cannot be read, or that belongs to another model or scorer.
    """
    check_chunk(
        options.compression_chunk_size,
        options.compression_window_size,
        options.compression_n_sink_tokens,
        PAGE_SIZE_ROWS,
    )
    path, profile = _profile_path(options), _profile_of(options)
    with _named(path):
        scorer = options.with_scorer_of(profile).scorer
    if profile is not None:
        with _named(path):
            profile.check(model=model, scorer_name=scorer.name, scorer_parameters=scorer.identity())
    statistics = () if profile is None else profile.arrays
    scorer.check_inputs(options.compression_window_size, statistics)
    level = options.compression_level or default_level(profile)
    shape = shape or ModelShape.of(model)
    scorer.check_model(shape.num_layers, model.hidden_size, shape.num_kv_heads)
    with _named(path):
        head_groups = allocate(
            level,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            ratio=options.compression_ratio,
            chunk_size_tokens=options.compression_chunk_size,
            page_size_rows=PAGE_SIZE_ROWS,
            page_group_size=group_size(options, shape.num_kv_heads),
            n_sink_tokens=options.compression_n_sink_tokens,
            profile=profile,
        )
    geometry = Geometry(
        head_groups=head_groups,
        num_query_heads=shape.num_query_heads,
        head_size=shape.head_size,
        itemsize_bytes=itemsize_bytes,
        chunk_size_tokens=options.compression_chunk_size,
        window_size_tokens=options.compression_window_size,
        n_sink_tokens=options.compression_n_sink_tokens,
        page_size_rows=PAGE_SIZE_ROWS,
        has_query_ring=scorer.needs_window_queries,
        has_stored_scores=scorer.stores_scores,
    )
    if options.compression_drift_sample:
        DriftReference.of(profile, level, options.compression_ratio, geometry)
    interpolated = ""
    if profile is not None and level == MEASURED:
        sizes = (
            geometry.page_group_size,
            geometry.chunk_size_tokens,
            PAGE_SIZE_ROWS,
            geometry.n_sink_tokens,
        )
        interpolated = interpolation(profile, options.compression_ratio, sizes)
    return CompressionPlan(
        geometry,
        scorer.name,
        level,
        path,
        options.compression_ratio,
        options.compression_drift_sample,
        scorer.changed_parameters(),
        interpolated=interpolated,
        weights_digest=scorer.identity().get("weights", ""),
    )


def _profile_path(options: CompressionOptions) -> str | None:
    path = options.compression_profile
    return None if path is None or path.lower() == NO_PROFILE else path


def _profile_of(options: CompressionOptions) -> Profile | None:
    path = _profile_path(options)
    return None if path is None else Profile.load(path)


@contextmanager
def _named(path: str | None) -> Iterator[None]:
    """What is wrong with a profile is said with its file."""
    try:
        yield
    except ProfileError as error:
        raise type(error)(f"--compression-profile {path}: {error}") from error


def plan_of(additional_config: object) -> CompressionPlan | None:
    """The plan in vLLM's `additional_config`; None when compression is off."""
    if not has_plan(additional_config):
        return None
    config: Any = additional_config
    return CompressionPlan.from_json(config[CONFIG_KEY]["plan"])


def has_plan(additional_config: object) -> bool:
    """Whether there is a plan in vLLM's `additional_config`: cheap enough for every step."""
    if not isinstance(additional_config, dict):
        return False
    plain = additional_config.get(CONFIG_KEY)
    return isinstance(plain, dict) and "plan" in plain
