"""What runs a layer's part of a step: the references, or the kernels of a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from tangram.geometry import Geometry
from tangram.vllm_plugin.worker.runners.step import HostStep, LayerStep

if TYPE_CHECKING:
    from tangram.vllm_plugin.worker.storage import QueryRing, SealedCache


class LayerRunner(Protocol):
    """One way to run layers; a worker has one.

    Attributes:
        is_device: whether kernels run, whose decode steps read nothing on the host.
    """

    is_device: bool

    def warm_up(self, sealed: SealedCache, ring: QueryRing | None) -> None:
        """Make ready what the first step would wait for; called before every step."""

    def cut(self, host: HostStep) -> None:
        """Add to a step that the host has cut what all its layers have in common."""

    def run(self, step: LayerStep) -> None:
        """Store the step's rows, seal what they complete, attend."""

    def for_layout(self, geometry: Geometry) -> LayerRunner:
        """The same on another layout, over the same caches."""

    def forget_caches(self) -> None:
        """Drop what holds addresses of caches, which are about to be made anew."""
