"""Figures about layouts: budgets of every level and ratio, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tangram.budgets import LEVELS, allocate
from tangram.errors import BudgetError, TangramError
from tangram.geometry import Geometry, HeadGroups
from tangram.plan.capacity import FULL_BLOCK_TOKENS, most_blocks
from tangram.plan.compression_plan import PAGE_SIZE_ROWS, group_size
from tangram.plan.options import CompressionOptions
from tangram.profile import Profile

DEFAULT_RATIOS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75)
MAX_RATIOS = 12
CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 49152, 65536, 98304, 131072)


@dataclass(frozen=True)
class Settings:
    """What the page is about, beside the profile.

    Attributes:
        ratios: that can be chosen on the page, rising.
        page_group_size: H_p.
        itemsize_bytes: bytes of one element of the cache.
    """

    ratios: tuple[float, ...]
    page_group_size: int
    itemsize_bytes: int

    @classmethod
    def of(
        cls,
        profile: Profile,
        *,
        ratios: Sequence[float] | None = None,
        page_group_size: int | None = None,
        itemsize_bytes: int = 2,
    ) -> Settings:
        """Settings with what was not asked for taken from the profile, or else from the server.

        Raises:
            ConfigurationError: the group size does not divide the profile's KV heads.
            BudgetError: a ratio that was asked for cannot be had.
        """
        measured = measured_sizes(profile)
        if page_group_size is None and measured:
            page_group_size = measured[0][1]
        options = CompressionOptions.from_mapping({"page_group_size": page_group_size})
        size = group_size(options, profile.model.num_kv_heads)
        if ratios is None:
            found = {ratio for ratio, _ in measured}
            usual = [ratio for ratio in DEFAULT_RATIOS if ratio not in found]
            ratios = [*sorted(found), *usual][:MAX_RATIOS]
            ratios = [ratio for ratio in ratios if _feasible(profile, ratio, size)] or [1.0]
        else:
            for ratio in ratios:
                head_groups(profile, "uniform", ratio, size)
        return cls(tuple(sorted(ratios)), size, itemsize_bytes)


def measured_sizes(profile: Profile) -> list[tuple[float, int]]:
    """(ratio, page group size) of each of the profile's measured budgets, as far as they are any.

    Other values under that name are passed over: only the ratio and the size are needed here.
    """
    heads = profile.model.num_kv_heads
    entries = profile.extra.get("measured")
    found = []
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, Mapping):
            ratio, size = entry.get("ratio"), entry.get("page_group_size")
            if isinstance(ratio, float | int) and 0 < ratio <= 1 and isinstance(size, int):
                if size > 0 and heads % size == 0:
                    found.append((float(ratio), size))
    return found


def head_groups(profile: Profile, level: str, ratio: float, page_group_size: int) -> HeadGroups:
    """Budgets with the chunk of the profile.

    Raises:
        TangramError: there are none; says why.
    """
    return allocate(
        level,
        num_layers=profile.model.num_layers,
        num_kv_heads=profile.model.num_kv_heads,
        ratio=ratio,
        chunk_size_tokens=profile.chunk_size_tokens,
        page_size_rows=PAGE_SIZE_ROWS,
        page_group_size=page_group_size,
        n_sink_tokens=profile.n_sink_tokens,
        profile=profile,
    )


def _feasible(profile: Profile, ratio: float, page_group_size: int) -> bool:
    try:
        head_groups(profile, "uniform", ratio, page_group_size)
    except BudgetError:
        return False
    return True


def layouts(
    profile: Profile,
    settings: Settings,
    *,
    has_query_ring: bool = False,
    has_stored_scores: bool = False,
) -> tuple[dict[str, list[Geometry]], dict[str, str]]:
    """The layout of every level at every ratio.

    Returns:
        level -> [ratios] layouts, and level -> reason for those that the profile cannot give.

    Raises:
        ConfigurationError: the profile's chunk, window and sinks do not fit each other.
    """
    found: dict[str, list[Geometry]] = {}
    missing = {}
    for level in LEVELS:
        try:
            groups = [
                head_groups(profile, level, ratio, settings.page_group_size)
                for ratio in settings.ratios
            ]
        except TangramError as error:
            missing[level] = str(error)
            continue
        found[level] = [
            Geometry(
                head_groups=each,
                num_query_heads=profile.model.num_query_heads,
                head_size=profile.model.head_size,
                itemsize_bytes=settings.itemsize_bytes,
                chunk_size_tokens=profile.chunk_size_tokens,
                window_size_tokens=profile.window_size_tokens,
                n_sink_tokens=profile.n_sink_tokens,
                page_size_rows=PAGE_SIZE_ROWS,
                has_query_ring=has_query_ring,
                has_stored_scores=has_stored_scores,
            )
            for each in groups
        ]
    return found, missing


def head_pages(groups: HeadGroups) -> np.ndarray:
    """[layers, kv_heads] int64, pages that each head keeps of a chunk."""
    pages = np.empty((groups.num_layers, groups.num_kv_heads), dtype=np.int64)
    for layer, (members, counts) in enumerate(zip(groups.heads, groups.pages, strict=True)):
        for heads, count in zip(members, counts, strict=True):
            pages[layer, list(heads)] = count
    return pages


def memory_bytes(layouts_by_ratio: Sequence[Geometry]) -> dict[str, Any]:
    """Bytes of one request by its length, as `tangram plan` counts them.

    Args:
        layouts_by_ratio: [ratios]; all levels of one ratio hold the same.

    Returns:
        `contexts` tokens; `full` bytes in vLLM's own blocks; `compressed` [ratios][contexts] bytes,
        the most held while a request decodes up to that length.
    """
    token_bytes = layouts_by_ratio[0].token_bytes
    blocks = [-(-context // FULL_BLOCK_TOKENS) for context in CONTEXTS]
    return {
        "contexts": list(CONTEXTS),
        "full": [count * FULL_BLOCK_TOKENS * token_bytes for count in blocks],
        "compressed": [
            [most_blocks(layout, context) * layout.block_bytes for context in CONTEXTS]
            for layout in layouts_by_ratio
        ],
    }
