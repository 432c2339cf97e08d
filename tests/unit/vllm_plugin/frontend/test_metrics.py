"""The metrics of compression in the frontend: who makes them, what they say, several processes."""

import logging
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY
from vllm.v1.metrics.stats import SchedulerStats

from tangram.plan.compression_plan import make_plan
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity
from tangram.vllm_plugin.core.counts import STATS_KEY, CacheCounts
from tangram.vllm_plugin.drift.board import DriftReading
from tangram.vllm_plugin.frontend.metrics import CompressionLogger, WritingCompressionLogger

ROOT = Path(__file__).resolve().parents[4]
MODEL = ModelIdentity("Sample", 2, 4, 8, 64, 512, 100)
OPTIONS = CompressionOptions(compression_ratio=0.25, compression_chunk_size=64)
PLAN = make_plan(OPTIONS, MODEL, itemsize_bytes=2)
COUNTS = CacheCounts(
    sealed=5, first=2, recent=3, query_ring=1, free=90, tail_tokens=37, new_chunks=4
)


def config(drift_sample: int = 0, num_blocks: int = 100) -> SimpleNamespace:
    plan = {**PLAN.to_json(), "drift_sample": drift_sample}
    return SimpleNamespace(
        additional_config={"tangram": {**OPTIONS.to_mapping(), "plan": plan}},
        model_config=SimpleNamespace(served_model_name="m"),
        cache_config=SimpleNamespace(num_gpu_blocks=num_blocks),
    )


def stats(counts: CacheCounts = COUNTS) -> SchedulerStats:
    return SchedulerStats(kv_connector_stats={STATS_KEY: asdict(counts)})


def value(name: str, engine: str = "0", **labels: str) -> float | None:
    labels |= {"model_name": "m", "engine": engine}
    return REGISTRY.get_sample_value(f"tangram:{name}", labels)


def test_counts_become_metrics_of_their_engine():
    logger = CompressionLogger(config(num_blocks=200), [0, 1])
    logger.log_engine_initialized()
    assert value("blocks", kind="free") == value("blocks", "1", kind="free") == 99
    logger.record(stats(), None, engine_idx=1)
    logger.record(stats(), None, engine_idx=1)
    g = PLAN.geometry
    found = {kind: value("blocks", "1", kind=kind) for kind in ("sealed", "recent", "query_ring")}
    assert found == {"sealed": 5, "recent": 3, "query_ring": 1}
    assert value("blocks", "1", kind="free") == 90
    assert value("retained_rows", "1") == 2 * g.chunk_rows(0) + 3 * g.chunk_rows(1)
    assert value("retained_bytes", "1") == value("retained_rows", "1") * g.row_bytes
    assert value("saved_bytes", "1") == (5 * 64 + 37) * g.token_bytes - 9 * g.block_bytes
    assert value("chunks_sealed_total", "1") == 8
    assert value("chunks_sealed_total", "0") == 0


def test_what_the_prefix_cache_saves_is_told_without_any_request():
    logger, g = CompressionLogger(config(), [0]), PLAN.geometry
    idle = CacheCounts(0, 0, 0, 0, 99, 0, 0, kept_tokens=7 * 64, kept_blocks=9)
    logger.record(stats(idle), None)
    assert value("saved_bytes") == 0
    assert value("cached_saved_bytes") == 7 * 64 * g.token_bytes - 9 * g.block_bytes


def test_the_layout_is_told_by_labels():
    CompressionLogger(config(), [0])
    labels = {"scorer": PLAN.scorer_name, "level": "uniform", "ratio": "0.25", "chunk_size": "64"}
    labels["scorer_parameters"] = ""
    assert value("layout_info", layout=PLAN.geometry.digest, **labels) == 1


def test_parameters_of_the_scorer_are_a_label():
    made = config()
    parameters = {"n_future_tokens": 64, "epsilon": 0.5}
    plan = made.additional_config["tangram"]["plan"]
    plan |= {"scorer_name": "expected_attention", "scorer_parameters": parameters}
    CompressionLogger(made, [0])
    labels = {"level": "uniform", "ratio": "0.25", "chunk_size": "64"}
    labels |= {"layout": PLAN.geometry.digest, "scorer": "expected_attention"}
    listed = "epsilon=0.5, n_future_tokens=64"
    assert value("layout_info", scorer_parameters=listed, **labels) == 1


def test_drift_has_metrics_only_where_it_is_sampled():
    reading = DriftReading(3, 1.5, 0.25, 0.125, 1.2)
    for every in (0, 100):
        logger = CompressionLogger(config(every), [0])
        for _ in range(2):
            logger.record(stats(replace(COUNTS, drift=reading)), None)
        found = [name for name in REGISTRY._names_to_collectors if name.startswith("tangram:drift")]
        assert bool(found) == (every > 0)
    fields = ("deviation", "heads_over_budget", "expected_over_budget", "limit")
    assert tuple(value(f"drift_{field}") for field in fields) == reading[1:]
    assert value("drift_sampled_chunks_total") == 6


def test_refusals_are_counted_by_reason():
    logger = CompressionLogger(config(), [0])
    logger.record_admission_rejection("max_num_queued_reqs")
    logger.record_admission_rejection("a reason of a later release")
    labels = {"model_name": "m", "reason": "max_num_queued_reqs"}
    assert REGISTRY.get_sample_value("tangram:refused_requests_total", labels) == 1


def test_a_second_engine_of_a_process_takes_the_metrics_over():
    CompressionLogger(config(), [0]).record(stats(), None)
    CompressionLogger(config(), [0])
    assert value("chunks_sealed_total") == 0


@pytest.mark.parametrize("foreign", [None, SchedulerStats()])
def test_statistics_without_counts_change_nothing(foreign):
    logger = CompressionLogger(config(), [0])
    logger.record(stats(), None)
    logger.record(foreign, None)
    assert value("blocks", kind="sealed") == 5


def test_the_log_has_a_line_for_every_engine(caplog):
    logger = WritingCompressionLogger(config(), [0, 1])
    logger.record(stats(), None, engine_idx=1)
    caplog.set_level("INFO", "vllm.tangram")
    logging.getLogger("vllm.tangram").addHandler(caplog.handler)
    logger.log()
    logger.record(stats(CacheCounts(0, 0, 0, 0, 99, 0, 0)), None, engine_idx=1)
    logger.log()
    logging.getLogger("vllm.tangram").removeHandler(caplog.handler)
    (line,) = {record.getMessage() for record in caplog.records}
    assert line.startswith("Engine 001: KV compression: ")
    assert "4 new, 4 in all, blocks: 5 sealed, 3 recent, 1 query ring, 90 free" in line


def test_several_api_servers_share_the_counts(tmp_path):
    """An engine tells each count to one of them, whichever; a scrape may reach any."""
    code = """
import os
from tests.unit.vllm_plugin.frontend.test_metrics import COUNTS, CompressionLogger, config, stats
from prometheus_client import CollectorRegistry, multiprocess
logger = CompressionLogger(config(), [0])
child = os.fork()
if child == 0:
    logger.record(stats(COUNTS), None)
    os._exit(0)
os.waitpid(child, 0)
logger.record(stats(type(COUNTS)(7, 2, 3, 1, 88, 37, 3)), None)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
labels = {"model_name": "m", "engine": "0"}
print(registry.get_sample_value("tangram:chunks_sealed_total", labels))
print(registry.get_sample_value("tangram:blocks", {**labels, "kind": "sealed"}))
"""
    environment = {"PYTHONPATH": f"{ROOT}/src:{ROOT}", "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split()[-2:] == ["7.0", "7.0"], done.stderr
