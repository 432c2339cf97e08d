"""Which KV heads share pages, and how many pages each of these head groups keeps of a chunk."""

from __future__ import annotations

from dataclasses import dataclass

from tangram.errors import BudgetError


@dataclass(frozen=True)
class HeadGroups:
    """Budgets of a model: constants that everything else is arithmetic on.

    Attributes:
        heads: [layers][groups][heads of a group], KV head indices of every head group; all groups
            of a model have the same number of heads, and a layer's groups hold each head once.
        pages: [layers][groups], pages that a group keeps of every chunk; a page holds P rows of
            each head of the group.

    Raises:
        BudgetError: the two do not describe the same groups, or a group keeps no page.
    """

    heads: tuple[tuple[tuple[int, ...], ...], ...]
    pages: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.heads or len(self.heads) != len(self.pages):
            raise BudgetError(
                f"heads describe {len(self.heads)} layers and pages {len(self.pages)}: "
                "both need the same number, at least one"
            )
        size = len(self.heads[0][0]) if self.heads[0] else 0
        if size == 0:
            raise BudgetError("layer 0 has no heads: every layer needs a head group with a head")
        for layer, (groups, pages) in enumerate(zip(self.heads, self.pages, strict=True)):
            if len(groups) != len(pages):
                raise BudgetError(
                    f"layer {layer} has {len(groups)} head groups and {len(pages)} page counts"
                )
            if any(len(group) != size for group in groups):
                raise BudgetError(f"layer {layer}: every head group needs {size} heads")
            members = sorted(head for group in groups for head in group)
            if members != list(range(len(members))) or len(members) != self.num_kv_heads:
                raise BudgetError(
                    f"layer {layer}: its groups must hold the heads 0 to {self.num_kv_heads - 1} "
                    f"once each, got {members}"
                )
            if min(pages) < 1:
                raise BudgetError(f"layer {layer}: every head group keeps at least one page")

    @property
    def num_layers(self) -> int:
        """Attention layers."""
        return len(self.heads)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of a layer."""
        return len(self.heads[0]) * len(self.heads[0][0])

    @property
    def group_size(self) -> int:
        """Heads of a group (H_p, `page_group_size`)."""
        return len(self.heads[0][0])

    @classmethod
    def from_lists(cls, heads: list[list[list[int]]], pages: list[list[int]]) -> HeadGroups:
        """The same from nested lists, as JSON holds them."""
        return cls(
            heads=tuple(tuple(tuple(int(h) for h in g) for g in layer) for layer in heads),
            pages=tuple(tuple(int(p) for p in layer) for layer in pages),
        )

    def to_lists(self) -> tuple[list[list[list[int]]], list[list[int]]]:
        """(heads, pages) as nested lists, for JSON."""
        return (
            [[list(group) for group in layer] for layer in self.heads],
            [list(layer) for layer in self.pages],
        )
