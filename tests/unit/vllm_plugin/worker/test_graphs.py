"""Which CUDA graphs are captured, and which of them serves a step; vLLM's own manager decides."""

from types import SimpleNamespace

import pytest
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, ModelCudaGraphManager

from tangram.kernels.extend import MAX_STEP_TOKENS
from tangram.vllm_plugin.worker import graphs
from tangram.vllm_plugin.worker.storage import SEALED_NAME

SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


@pytest.fixture(autouse=True)
def installed():
    graphs.install()


def make_manager(mode=CUDAGraphMode.FULL_AND_PIECEWISE, sizes=SIZES, is_device=True, sealed=True):
    """A manager that has captured what it would, without a GPU."""
    manager = object.__new__(ModelCudaGraphManager)
    cache = SimpleNamespace(runner=SimpleNamespace(is_device=is_device), samples_next=False)
    manager.compilation_config = SimpleNamespace(
        cudagraph_capture_sizes=sizes,
        max_cudagraph_capture_size=max(sizes),
        static_forward_context={SEALED_NAME: cache} if sealed else {},
    )
    manager.vllm_config = SimpleNamespace(
        speculative_config=None,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    manager.cudagraph_mode, manager.decode_query_len, manager.max_num_reqs = mode, 1, 64
    manager.lora_capture_cases, manager._lora_dispatch_map = [0], {}
    manager.varlen_decode, manager.ubatch_runner = False, None
    manager._candidates, manager._capture_descs = {}, {}
    manager._init_candidates()
    manager._graphs_captured = True
    return manager, cache


def dispatch(manager, counts):
    uniform = counts[0] if len(set(counts)) == 1 else None
    return manager.dispatch(len(counts), sum(counts), uniform, 0)


@pytest.mark.parametrize(
    ("counts", "tokens"),
    [
        ([334], 336),
        ([1] * 48 + [334], 384),
        ([5, 5], 16),
        ([1, 2], 4),
        ([200, 300], 512),
        ([MAX_STEP_TOKENS], MAX_STEP_TOKENS),
    ],
)
def test_a_small_step_with_prefill_is_one_graph(counts, tokens):
    manager, _ = make_manager()
    desc = dispatch(manager, counts)
    assert (desc.cg_mode, desc.num_tokens) == (FULL, tokens)
    assert desc.uniform_token_count is None and desc.num_reqs == min(tokens, 64)
    assert desc in manager._capture_descs[FULL]


def test_decode_steps_keep_graphs_of_their_own():
    manager, _ = make_manager()
    desc = dispatch(manager, [1] * 48)
    assert (desc.cg_mode, desc.num_tokens, desc.uniform_token_count) == (FULL, 48, 1)


def test_nothing_is_captured_twice_and_no_piece_that_no_step_takes():
    manager, _ = make_manager()
    full = manager._capture_descs[FULL]
    assert PIECEWISE not in manager._capture_descs and len(set(full)) == len(full)
    # The outputs' buffer is made for the first one.
    assert full[0].num_tokens == max(SIZES)
    assert [d.num_tokens for d in full] == sorted((d.num_tokens for d in full), reverse=True)
    taken = {desc for descs in manager._candidates.values() for desc in descs}
    assert taken == set(full)


def test_a_larger_step_is_no_graph():
    manager, _ = make_manager()
    assert dispatch(manager, [MAX_STEP_TOKENS + 1]).cg_mode == CUDAGraphMode.NONE


def test_a_step_of_which_a_chunk_is_sampled_is_no_graph():
    manager, cache = make_manager()
    cache.samples_next = True
    desc = dispatch(manager, [1] * 48 + [334])
    assert (desc.cg_mode, desc.num_tokens, desc.num_reqs) == (CUDAGraphMode.NONE, 382, 49)
    assert dispatch(manager, [1] * 48).cg_mode == FULL


def test_sizes_that_are_asked_for_are_those_that_are_captured():
    manager, _ = make_manager(sizes=[8, 128])
    assert dispatch(manager, [100]).num_tokens == 128
    assert dispatch(manager, [200]).cg_mode == CUDAGraphMode.NONE
    manager, _ = make_manager(sizes=[8, 2048])
    assert dispatch(manager, [5]).cg_mode == FULL
    # Beyond what kernels cut vLLM's pieces remain.
    assert dispatch(manager, [MAX_STEP_TOKENS + 1]).cg_mode == PIECEWISE
    assert [d.num_tokens for d in manager._capture_descs[PIECEWISE]] == [2048]


@pytest.mark.parametrize(
    "others",
    [
        {"sealed": False},
        {"is_device": False},
        {"mode": CUDAGraphMode.FULL_DECODE_ONLY},
        {"mode": CUDAGraphMode.PIECEWISE},
    ],
)
def test_elsewhere_vllm_captures_what_it_would(others):
    manager, _ = make_manager(**others)
    plain = object.__new__(ModelCudaGraphManager)
    plain.__dict__.update(vars(manager), _candidates={}, _capture_descs={})
    original = ModelCudaGraphManager._init_candidates.__wrapped__
    original(plain)
    assert manager._capture_descs == plain._capture_descs
    assert manager._candidates == plain._candidates
    assert isinstance(dispatch(manager, [334]), BatchExecutionDescriptor)


def test_a_mode_that_captures_no_whole_step_is_told(caplog):
    with caplog.at_level("INFO", logger="vllm.tangram"):
        make_manager(mode=CUDAGraphMode.PIECEWISE)
    assert "FULL_AND_PIECEWISE makes them one" in caplog.text
