"""One layer's step on the references: any device, cut on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tangram.geometry import Geometry
from tangram.kernels.reference.attend import attend
from tangram.vllm_plugin.worker.runners.sealing import sample_drift, seal_step
from tangram.vllm_plugin.worker.runners.step import HostStep, LayerStep

if TYPE_CHECKING:
    from tangram.vllm_plugin.worker.storage import QueryRing, SealedCache


class HostRunner:
    """Layers on the references; holds nothing, so that there is nothing to make ready or drop."""

    is_device = False

    def warm_up(self, sealed: SealedCache, ring: QueryRing | None) -> None:
        """Nothing."""

    def cut(self, host: HostStep) -> None:
        """Nothing: segments are all that the references ask for."""

    def for_layout(self, geometry: Geometry) -> HostRunner:
        """The same: the layout is asked of the step."""
        return self

    def forget_caches(self) -> None:
        """Nothing."""

    def run(self, step: LayerStep) -> None:
        """Store the step's rows, seal what they complete, attend."""
        host = step.host
        assert host is not None
        step.store_rows()
        seal_step(step, host)
        sample_drift(step, host)
        step.store_queries()
        attend(
            step.query,
            host.segments,
            step.view,
            geometry=step.sealed.geometry,
            layer=step.layer,
            softmax_scale=step.softmax_scale,
            out=step.out,
        )
