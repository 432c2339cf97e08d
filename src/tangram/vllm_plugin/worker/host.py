"""One layer's step on the references: any device, cut on the host."""

from __future__ import annotations

from tangram.kernels.reference.attend import attend
from tangram.kernels.store import store
from tangram.vllm_plugin.worker.sealing import sample_drift, seal_step
from tangram.vllm_plugin.worker.step import LayerStep


def run_on_host(step: LayerStep) -> None:
    """Store the step's rows, seal what they complete, attend."""
    host = step.host
    assert host is not None
    store(step.key, step.value, step.slot_mapping, step.recent_cache)
    seal_step(step, host)
    sample_drift(step, host)
    step.store_queries()
    attend(
        step.query,
        host.segments,
        step.sealed.pages,
        step.sealed_table,
        step.recent_cache,
        step.recent_table,
        geometry=step.sealed.geometry,
        layer=step.layer,
        softmax_scale=step.softmax_scale,
        out=step.out,
    )
