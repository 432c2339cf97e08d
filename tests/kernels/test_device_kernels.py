"""A worker's kernels put together, without a worker: what a step and the warm-up run."""

from types import SimpleNamespace

import pytest
import torch

from tangram.kernels.segments import cut_step
from tangram.scorers import get_scorer
from tangram.vllm_plugin.worker.runners import device as device_module
from tangram.vllm_plugin.worker.runners import small_steps as small_steps_module
from tangram.vllm_plugin.worker.runners import step as step_module
from tangram.vllm_plugin.worker.runners.device import DeviceKernels
from tangram.vllm_plugin.worker.runners.step import HostStep, LayerStep
from tests.kernels import test_seal_decode as sealing
from tests.kernels.inputs import TOLERANCE, make_geometry, needs_of, relative_error
from tests.kernels.paged_attention import paged_attention

SMALL_STEP = ["decode_attention", "extend_attention"]
"""What attends in one, whatever it has."""


@pytest.fixture
def few_processors(kernel_device, monkeypatch):
    """A device of two processors, where there is no GPU to ask."""
    if kernel_device == "cpu":
        fake = SimpleNamespace(multi_processor_count=2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: fake)
    return kernel_device


@pytest.fixture
def launches(monkeypatch):
    """Names of what a step runs, in order; everything runs nevertheless."""
    names = []
    of_device = ("seal_decode", "prefill_attention", "decode_attention")
    places = [(device_module, name) for name in of_device]
    places += [(step_module, name) for name in ("store", "store_queries")]
    of_small_steps = ("cut", "extend_attention", "decode_attention")
    places += [(small_steps_module, name) for name in of_small_steps]
    for module, name in places:
        function = getattr(module, name)

        def record(*args, name=name, function=function, **options):
            names.append(name)
            return function(*args, **options)

        monkeypatch.setattr(module, name, record)
    return names


class Worker:
    """The caches of a case on a device, the kernels over them, and stand-ins for vLLM's layers."""

    def __init__(self, case, scorer, device, flash=None, max_requests=None):
        g, self.device = case.pool.geometry, torch.device(device)
        self.case, self.base = case, case.base.to(device, copy=True)
        self.recent = sealing.recent_caches(case, self.base)
        self.sealed = SimpleNamespace(
            geometry=g, pages=sealing.in_base(case.pool.sealed_cache, self.base), drift=None
        )
        self.ring = None
        if g.has_query_ring:
            self.ring = SimpleNamespace(queries=case.ring.to(device, copy=True))
        self.kernels = DeviceKernels(
            g,
            sealing.seal_scorer(case, scorer.name, scorer.parameters(), device),
            self.device,
            max_requests or len(case.seq_lens),
            lambda: self.recent,
            flash=flash,
            max_step_tokens=100,
        )

    def decode(self):
        """One decode step of all layers."""
        return self.run(is_decode=True)

    def run(self, is_decode=False, on_host=False):
        """One step of all layers, whose rows are stored already: their slots are padding.

        Returns:
            [layers, tokens, query_heads, head_size], the outputs; NaN where nothing was written.
        """
        case, g, host = self.case, self.case.pool.geometry, None
        view = sealing.view_of(case, self.base)
        if self.ring is not None:
            view = view._replace(ring=self.ring.queries)
        self.kernels.warm_up(self.sealed, self.ring)
        if on_host:
            query_start, after = (
                t.numpy().astype("int64") for t in (case.query_start, case.seq_lens)
            )
            host = HostStep(query_start, after, *cut_step(g, query_start, after))
            self.kernels.cut(host)
        query = case.query.to(self.device)
        outs = []
        for layer in range(g.num_layers):
            outs.append(torch.full_like(query, torch.nan))
            self.kernels.run(
                LayerStep(
                    layer=layer,
                    softmax_scale=sealing.SCALE,
                    query=query,
                    key=query[:, : g.num_kv_heads],
                    value=query[:, : g.num_kv_heads],
                    out=outs[-1],
                    slot_mapping=torch.full((len(query),), -1, device=self.device),
                    view=view.of_layer(self.recent[layer]),
                    sealed=self.sealed,
                    host=host,
                    is_decode=is_decode,
                    scores=query[:, : g.num_kv_heads, 0].float() if g.has_stored_scores else None,
                )
            )
        return torch.stack(outs)


@pytest.mark.parametrize("name", ["key_diff", "snap_kv", "fastkvzip"])
def test_a_small_step_is_the_same_whether_the_device_cuts_it_or_the_host(few_processors, name):
    """Sealed bits and ring too; a decode stands behind a prompt, and rows are padded."""
    dtype, scorer = torch.float16, get_scorer(name)
    g = make_geometry([[1, 2], [3, 1]], dtype=dtype, **needs_of(name))
    workers = [
        Worker(
            sealing.make_case(
                g, [65, 140, 64, 100], dtype=dtype, step_tokens=[1, 90, 1, 20], seed=4, padding=2
            ),
            scorer,
            few_processors,
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.base[0] = 0
    by_device, by_host = workers[0].run(), workers[1].run(on_host=True)
    tokens = int(workers[0].case.query_start[-1])
    # Only the first layer has sealed rows of earlier steps.
    assert relative_error(by_device[0, :tokens], by_host[0, :tokens]) < TOLERANCE[dtype]
    for kept in ("base", "ring"):
        one, other = (getattr(worker, kept) for worker in workers)
        if kept == "ring":
            one, other = (None if r is None else r.queries for r in (one, other))
        assert one is None or torch.equal(sealing.bits(one), sealing.bits(other))
    assert not by_device[:, tokens:].any(), "a padded row is not zero"


def test_a_single_token_sees_the_chunk_that_another_requests_step_completes(few_processors):
    """vLLM lets a request hit a chunk in the step that computes it, and one token may be left."""
    dtype, outs = torch.float16, []
    g = make_geometry([[1, 2], [3, 1]], dtype=dtype)
    for on_host in (False, True):
        case = sealing.make_case(g, [65, 65, 70], dtype=dtype, step_tokens=[65, 1, 1], seed=2)
        case.pool.sealed_table[1, 0] = case.pool.sealed_table[0, 0]
        in_chunk = g.chunk_size_tokens // g.recent_block_tokens
        case.pool.recent_table[1, :in_chunk] = case.pool.recent_table[0, :in_chunk]
        worker = Worker(case, get_scorer("key_diff"), few_processors)
        worker.base[0] = 0
        outs.append(worker.run(on_host=on_host)[0])
    assert relative_error(*outs) < TOLERANCE[dtype]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_decode_step_seals_by_the_statistics_of_queries(few_processors, swapped):
    """Of other budgets too, once they are swapped in."""
    name, device = "expected_attention", few_processors
    dtype = torch.float16
    g = make_geometry([[1, 2], [3, 1]], dtype=dtype)
    case = sealing.make_case(g, [64, 128, 70], dtype=dtype, seed=1)
    worker = Worker(case, get_scorer(name), device)
    if swapped:
        other = make_geometry([[2, 1], [1, 3]], dtype=dtype)
        assert other.block_bytes == g.block_bytes
        case.pool.geometry = worker.sealed.geometry = other
        worker.kernels = worker.kernels.for_layout(other)
    worker.decode()
    expected = sealing.expected_base(case, [0, 1], name, {})
    assert torch.equal(sealing.bits(worker.base.cpu()), sealing.bits(expected))
    assert not torch.equal(sealing.bits(expected), sealing.bits(case.base))


@pytest.mark.parametrize("name", ["key_diff", "snap_kv", "expected_attention", "kvzap"])
def test_the_warm_up_runs_a_prompt_once_and_touches_the_null_block_alone(
    few_processors, launches, name
):
    dtype, scorer = torch.float16, get_scorer(name)
    g = make_geometry([[1, 2]], dtype=dtype, **needs_of(name))
    worker = Worker(sealing.make_case(g, [64, 70], dtype=dtype), scorer, few_processors)
    worker.base[0] = 0  # as caches are when vLLM makes them
    rings = [] if worker.ring is None else [worker.ring.queries]
    before = [tensor.clone() for tensor in (worker.base, *rings)]
    worker.kernels.warm_up(worker.sealed, worker.ring)
    # The window's older queries are in the ring until those of the step replace them.
    of_ring = ["store_queries"] if worker.ring else []
    prompt = ["seal_decode", *of_ring, "prefill_attention"]
    assert [name for name in launches if name != "cut"] == [*prompt, *SMALL_STEP]
    for tensor, was in zip((worker.base, *rings), before, strict=True):
        assert torch.equal(sealing.bits(tensor[1:]), sealing.bits(was[1:]))
    ran = len(launches)
    worker.kernels.warm_up(worker.sealed, worker.ring)
    assert len(launches) == ran
    worker.kernels.forget_caches()
    worker.kernels.warm_up(worker.sealed, worker.ring)
    assert len(launches) == 2 * ran


def test_the_warm_up_takes_flash_attention_too_where_it_is_there(few_processors, launches):
    calls = []

    def flash(**arguments):
        calls.append(arguments["block_table"])
        return paged_attention(**arguments)

    g = make_geometry([[1, 2]], dtype=torch.float16)
    case = sealing.make_case(g, [64, 70], dtype=torch.float16)
    worker = Worker(case, get_scorer("key_diff"), few_processors, flash)
    worker.base[0] = 0
    worker.kernels.warm_up(worker.sealed, worker.ring)
    attended = [name for name in launches if name != "cut"]
    assert attended == ["seal_decode", "prefill_attention", *SMALL_STEP, "prefill_attention"]
    assert len(calls) == 1 and len(calls[0]) == g.num_kv_heads
    # Room for a step of 100 tokens is taken by now.
    workspace, rows = worker.kernels._flash_workspace, (100, g.num_query_heads, g.head_size)
    before = workspace.give("out", torch.float16, 1).data_ptr()
    assert workspace.give("out", torch.float16, *rows).data_ptr() == before


def test_the_first_layer_of_a_step_finds_the_shares_of_all(few_processors, monkeypatch):
    """And the warm-up loads what finds them, for every number of requests."""
    scheduled = []
    for module in (device_module, small_steps_module):
        monkeypatch.setattr(
            module, "schedule", lambda view, batch, *others: scheduled.append(batch)
        )
        monkeypatch.setattr(module, "decode_attention", lambda *args, **options: None)
    g = make_geometry([[1, 2], [2, 1]], dtype=torch.float16)
    case = sealing.make_case(g, [64, 70, 65], dtype=torch.float16)
    worker = Worker(case, get_scorer("key_diff"), few_processors, max_requests=200)
    worker.base[0] = 0
    worker.kernels.warm_up(worker.sealed, worker.ring)
    # It is compiled for 64 requests, 128 and 256.
    assert {64, 128, 200} <= set(scheduled)
    scheduled.clear()
    worker.decode()
    assert scheduled == [3]
