"""A worker without the split map: decode attention cuts every head into as many parts.

The side `evenly-cut` is served with `--worker-cls benchmarks.serving.evenly_cut.EvenlyCutWorker`.
The product has no switch for it; this replaces, in a worker of its own, what makes the map.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.worker.gpu_worker import Worker

from benchmarks.serving.sides import EVENLY_CUT_LINE
from tangram.kernels.decode import SplitMap, make_split_map
from tangram.vllm_plugin.worker.runners import device

logger = init_logger(f"vllm.{__name__}")  # only what is below vLLM's own is printed


class EvenlyCutWorker(Worker):
    """vLLM's worker on a GPU, whose compressed decode steps are cut without regard to budgets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        device.make_split_map = _cut_evenly
        super().__init__(*args, **kwargs)


def _cut_evenly(*args: Any, **kwargs: Any) -> SplitMap:
    logger.info_once(EVENLY_CUT_LINE)
    return make_split_map(*args, **kwargs).evenly()
