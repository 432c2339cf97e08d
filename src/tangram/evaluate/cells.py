"""What an evaluation is made of: scripts to play, settings to play them on, and one engine each.

`make_engine` and `play_scripts` know nothing of each other, so that an engine whose budgets are
swapped while it runs can be played on as well.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tangram.errors import ConfigurationError, TangramError
from tangram.evaluate.play import Engine, Script, play
from tangram.evaluate.results import Cell, cell_figures
from tangram.plan.cached import with_profile_at_hand
from tangram.plan.compression_plan import CompressionPlan, make_plan, with_scorer
from tangram.plan.model_facts import ModelFacts, served_config
from tangram.plan.models import PROFILE_FILE, RECALL_GROUP_SIZE, bundled_model, is_bundled
from tangram.plan.options import NO_PROFILE, CompressionOptions
from tangram.plan.supported import refuse_model, refuse_options
from tangram.profile import ModelIdentity
from tangram.scorers import is_auto, registered_name

if TYPE_CHECKING:
    from tangram.engines.greedy import GreedyEngine

PROFILE_SUFFIX = ".profile"
FULL_KV = "full KV"


@dataclass(frozen=True)
class Setting:
    """How an engine is set up.

    Attributes:
        options: of compression; None for full KV on stock vLLM.
        plan: what they come to.
        token_bytes: bytes of the KV cache for a token of a long conversation.
    """

    options: CompressionOptions | None
    plan: CompressionPlan | None
    token_bytes: float

    @property
    def title(self) -> str:
        """The setting in a few words."""
        if self.options is None or self.plan is None:
            return FULL_KV
        return (
            f"{self.plan.scorer_title}, {self.plan.level}, ratio {self.options.compression_ratio:g}"
        )

    @cached_property
    def statistics_digest(self) -> str | None:
        """Differs when what the scorer reads of its profile does; None where it reads nothing.

        Raises:
            ProfileError: the profile cannot be read any more, or lacks what the scorer reads.
        """
        if self.plan is None or not self.plan.scorer.needs_statistics:
            return None
        profile = self.plan.load_profile()
        assert profile is not None, "a plan without the scorer's statistics"
        digest = hashlib.sha256()
        for name in self.plan.scorer.needs_statistics:
            array = profile.require(name, self.plan.level)
            digest.update(f"\0{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def differs_in_budgets_alone(self, other: Setting) -> bool:
        """Whether an engine of the other serves this one when its budgets are swapped.

        Of a profile the engine keeps what the scorer reads; budgets may come from another one.
        """
        if self.options is None or other.options is None:
            return False
        of_budgets = ("compression_level", "compression_profile")
        mine = {name: getattr(self.options, name) for name in of_budgets}
        return (
            self.options == replace(other.options, **mine)
            and self.statistics_digest == other.statistics_digest
        )

    def to_json(self) -> dict[str, Any]:
        """The setting as part of a cell's figures."""
        if self.options is None or self.plan is None:
            return {
                "scorer": None,
                "level": None,
                "ratio": 1.0,
                "chunk_size": None,
                "window_size": None,
                "sink_tokens": None,
                "page_group_size": None,
                "profile": None,
                "layout": None,
                "kv_bytes_per_token": self.token_bytes,
            }
        layout = self.plan.geometry
        # Left out without any: cells of files from before there were parameters stay the same.
        parameters = {"scorer_parameters": dict(self.plan.scorer_parameters)}
        return {
            "scorer": self.plan.scorer_name,
            **(parameters if self.plan.scorer_parameters else {}),
            "level": self.plan.level,
            "ratio": self.options.compression_ratio,
            "chunk_size": layout.chunk_size_tokens,
            "window_size": layout.window_size_tokens,
            "sink_tokens": layout.n_sink_tokens,
            "page_group_size": layout.page_group_size,
            "profile": self.plan.profile_path,
            "layout": layout.digest,
            "kv_bytes_per_token": self.token_bytes,
        }


@dataclass(frozen=True)
class Grid:
    """Every combination of these is a setting; None is the option's own default.

    Attributes:
        ratios: shares of the rows that are kept.
        scorers: names; `auto` is the profile's.
        levels: budget rules.
        chunk_sizes: C.
        window_sizes: W.
        sink_tokens: S.
        page_group_sizes: H_p.
        profile: file, folder or pattern with `{scorer}`; `none`; or None for the bundled one.
        scorer_parameters: by registry name of the scorer; those not there have their defaults.
    """

    ratios: Sequence[float]
    scorers: Sequence[str]
    levels: Sequence[str | None] = (None,)
    chunk_sizes: Sequence[int | None] = (None,)
    window_sizes: Sequence[int | None] = (None,)
    sink_tokens: Sequence[int | None] = (None,)
    page_group_sizes: Sequence[int | None] = (None,)
    profile: str | None = None
    scorer_parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def make_settings(
    grid: Grid,
    model: str,
    config: Mapping[str, Any],
    itemsize_bytes: int,
    engine: Mapping[str, Any] = MappingProxyType({}),
) -> list[Setting]:
    """Full KV first, then every combination of the grid, planned.

    Combinations that come to the same layout and scorer are one setting.

    Args:
        grid: what is combined.
        model: folder or name.
        config: of the model.
        itemsize_bytes: bytes of one element of the cache.
        engine: arguments of vLLM's engine that were given beside.

    Raises:
        ConfigurationError: a combination that cannot be served; names it, and what to change.
    """
    refuse_options(engine, "--engine")
    config = served_config(config, engine)
    refuse_model(model, ModelFacts.from_config(config, engine))
    identity = ModelIdentity.from_config(config)
    compressed: dict[tuple[object, ...], Setting] = {}
    axes = (
        grid.scorers,
        grid.chunk_sizes,
        grid.window_sizes,
        grid.sink_tokens,
        grid.page_group_sizes,
        grid.ratios,
        grid.levels,  # last: neighbours that differ in it alone share an engine
    )
    for scorer, chunk, window, sinks, group, ratio, level in product(*axes):
        given = {
            "compression_scorer": scorer,
            "compression_scorer_parameters": grid.scorer_parameters.get(registered_name(scorer)),
            "compression_level": level,
            "compression_chunk_size": chunk,
            "compression_window_size": window,
            "compression_n_sink_tokens": sinks,
            "page_group_size": RECALL_GROUP_SIZE if group is None and is_bundled(model) else group,
            "compression_ratio": ratio,
            "compression_profile": _profile_of(grid.profile, scorer, model),
        }
        try:
            options = CompressionOptions.from_mapping(given)
            options = with_scorer(with_profile_at_hand(options, model, identity, "--profile"))
            plan = make_plan(options, identity, itemsize_bytes)
        except TangramError as error:
            asked = {"scorer": scorer, "level": level, "chunk size": chunk, "ratio": ratio}
            named = ", ".join(f"{name} {value}" for name, value in asked.items() if value)
            raise ConfigurationError(
                f"the setting {named} cannot be evaluated: {error} (the lists are --ratios, "
                "--scorers, --levels, --chunk-sizes, --window-sizes, --sink-tokens, "
                "--page-group-sizes)"
            ) from error
        layout = plan.geometry
        setting = Setting(options, plan, layout.block_bytes / layout.chunk_size_tokens)
        compressed.setdefault((plan.scorer_name, plan.level, ratio, layout.digest), setting)
    settings = list(compressed.values())
    first = settings[0].plan
    assert first is not None
    return [Setting(None, None, first.geometry.token_bytes), *settings]


def _profile_of(asked: str | None, scorer: str, model: str) -> str | None:
    """The profile of a scorer, or `none`; None where nothing was said and none is bundled.

    Raises:
        ConfigurationError: what was asked for has none of this scorer.
    """
    name = registered_name(scorer)
    if asked is None:
        file = PROFILE_FILE if is_auto(scorer) else f"{name}{PROFILE_SUFFIX}"
        bundled = bundled_model() / file if is_bundled(model) else None
        return str(bundled) if bundled and bundled.is_file() else None
    if asked.lower() == NO_PROFILE:
        return NO_PROFILE
    path = Path(asked.replace("{scorer}", name))
    if path.is_dir():
        path = path / f"{name}{PROFILE_SUFFIX}"
    if not path.is_file():
        raise ConfigurationError(
            f"--profile {asked}: there is no profile of scorer {name} at {path}; calibrate one, "
            "leave the scorer out of --scorers, or give --profile none for uniform budgets"
        )
    return str(path)


def make_engine(
    model: str, setting: Setting, max_model_len: int, options: Mapping[str, Any]
) -> GreedyEngine:
    """The engine of a setting; to be closed by who asked for it.

    Args:
        model: folder or name.
        setting: compression, or none.
        max_model_len: tokens of the longest conversation.
        options: keyword arguments of `vllm.LLM`.
    """
    from tangram.engines.greedy import GreedyEngine

    compression = None
    if setting.options is not None:
        given = setting.options.to_mapping()
        compression = {name: value for name, value in given.items() if value is not None}
    return GreedyEngine(model, compression, max_model_len=max_model_len, **options)


class Engines:
    """One engine at a time, kept while only budgets change; gone when the block ends.

    Args:
        make: the engine of a setting.
        swaps: whether its engines take other budgets, as those without captured graphs do.
    """

    def __init__(self, make: Callable[[Setting], Any], swaps: bool) -> None:
        self._make, self._swaps = make, swaps
        self._engine: Any = None
        self._setting: Setting | None = None

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *error: object) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = self._setting = None

    def of(self, setting: Setting) -> Any:
        """The engine of a setting; the one before may be closed for it."""
        if (
            self._setting is not None
            and setting.plan is not None
            and self._swaps
            and setting.differs_in_budgets_alone(self._setting)
        ):
            self._engine.swap_budgets(setting.plan.geometry.head_groups)
        else:
            self.__exit__()
            self._engine = self._make(setting)
        self._setting = setting
        return self._engine


def play_scripts(
    engine: Engine,
    scripts: Sequence[Script],
    on_cell: Callable[[Script, Cell], None],
    on_turn: Callable[[Script, int], None] = lambda script, done: None,
) -> None:
    """Play scripts one after another on a running engine.

    Args:
        engine: which is not closed.
        scripts: what is played.
        on_cell: called with a script's figures as soon as they are there.
        on_turn: called with the number of a script's questions that are answered.
    """
    for script in scripts:
        started_s = time.perf_counter()
        replies = play(engine, script, partial(on_turn, script))
        on_cell(script, cell_figures(script, replies, time.perf_counter() - started_s))
