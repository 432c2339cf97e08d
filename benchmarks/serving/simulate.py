"""Which histories a cache still holds: conversations against vLLM's scheduler, without a model.

    python -m benchmarks.serving.simulate --model qwen3-4b --retention FILE \
        --cells mid/closed:48,mid/closed:72 --memory-gib 116.4 --out simulated.jsonl

The scheduler, its pool and its prefix cache are the real ones, with the cache groups of the side
that is asked for; answers are random ids, and a step takes as long as `StepTime` says. What is hit
and what is evicted follows from them. No GPU is needed, and a cell of 100 s takes some seconds.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.serving.drive import add_model_options, cells_of, listed, provenance
from benchmarks.serving.load import Level
from benchmarks.serving.mistakes import output_file, tells_mistakes
from benchmarks.serving.records import spread
from benchmarks.serving.sides import SIDES, Model, compression, find_model
from benchmarks.serving.workloads import (
    FIRST_TOKEN_ID,
    WORKLOADS,
    Script,
    Workload,
    make_script,
    open_loop,
)
from tangram.arguments import positive
from tangram.errors import ConfigurationError
from tangram.evaluate.results import append_line
from tangram.plan.compression_plan import plan_of
from tangram.plan.options import CONFIG_KEY
from tangram.profile import ModelIdentity
from tangram.vllm_plugin import register
from tangram.vllm_plugin.compat.planning import plan_caches
from tangram.vllm_plugin.core.specs import QueryRingSpec, RecentSpec, SealedSpec
from tangram.vllm_plugin.worker.storage import RING_NAME, SEALED_NAME

PLAYED = ("stock", "tangram", "unragged", "uniform")


@dataclass(frozen=True)
class StepTime:
    """How long a step takes; the defaults are of Qwen3-4B's shape on an H200.

    They follow from benchmarks/results/h200: a decode step of 16 requests of 8K, a first token of
    32K, and the attention in it.

    Attributes:
        step_s: of every step.
        token_s: of a token of a prompt, without its attention.
        pair_s: of a query of a prompt and a token that it sees, all of it kept.
        kv_bytes_per_s: at which a decode step reads rows.
    """

    step_s: float = 3.2e-3
    token_s: float = 14.1e-6
    pair_s: float = 0.887e-9
    kv_bytes_per_s: float = 3.9e12

    def slower(self, times: float) -> StepTime:
        """Everything takes so many times as long."""
        return StepTime(
            self.step_s * times,
            self.token_s * times,
            self.pair_s * times,
            self.kv_bytes_per_s / times,
        )

    def of(self, prompts: list[tuple[int, int]], decode_bytes: float, kept: float) -> float:
        """Seconds of a step.

        Args:
            prompts: (tokens, tokens before them) of every part of a prompt.
            decode_bytes: rows that the other requests read.
            kept: share of the rows that queries see.
        """
        pairs = sum(count * (before + count / 2) for count, before in prompts)
        tokens = sum(count for count, _ in prompts)
        prefill_s = tokens * self.token_s + pairs * kept * self.pair_s
        return self.step_s + prefill_s + decode_bytes / self.kv_bytes_per_s


class Engine:
    """A scheduler with the cache of a side, and what its steps take.

    Args:
        side: of `PLAYED`.
        model: by shape.
        args: options of `parser`.
        time: of a step.
    """

    def __init__(self, side: str, model: Model, args: argparse.Namespace, time: StepTime) -> None:
        self.config, specs, self.kept, layout = _configured(side, model, args)
        cache = self.config.cache_config
        cache.kv_cache_layout = layout
        caches = plan_caches(self.config, [specs], [int(args.memory_gib * 2**30)])
        pool = kv_cache_utils.generate_scheduler_kv_cache_config(caches)
        cache.num_gpu_blocks = pool.num_blocks
        sizes = kv_cache_utils.resolve_kv_cache_block_sizes(pool, self.config)
        pool.hash_block_size = sizes[1]
        pool.cache_hit_alignment_tokens = kv_cache_utils.resolve_cache_hit_alignment_tokens(
            pool, self.config, *sizes
        )
        hash_of = get_hash_fn_by_name(cache.prefix_caching_hash_algo)
        kv_cache_utils.init_none_hash(hash_of)
        self._hasher = kv_cache_utils.get_request_block_hasher(sizes[1], hash_of)
        self.scheduler = self.config.scheduler_config.get_scheduler_cls()(
            vllm_config=self.config,
            kv_cache_config=pool,
            structured_output_manager=StructuredOutputManager(self.config),
            block_size=sizes[0],
            hash_block_size=sizes[1],
        )
        identity = ModelIdentity.from_config(model.config)
        heads = identity.num_layers * identity.num_kv_heads
        self._token_bytes = 2 * heads * identity.head_size * torch.bfloat16.itemsize
        self._time, self._vocab_size = time, model.vocab_size
        self._random = random.Random(args.seed)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the pool is held."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return bool(pool.get_num_free_blocks() == pool.num_gpu_blocks - 1)

    def add(self, name: str, prompt: list[int], answer_tokens: int, now: float) -> Request:
        """Queue a request."""
        wanted = SamplingParams(max_tokens=answer_tokens, ignore_eos=True, temperature=0)
        request = Request(name, prompt, wanted, None, block_hasher=self._hasher, arrival_time=now)
        self.scheduler.add_request(request)
        return request

    def step(self, live: dict[str, Request]) -> tuple[float, dict[str, int], list[Request]]:
        """Run a step.

        Args:
            live: requests by name.

        Returns:
            Its seconds; cached tokens of the requests that it began; those that it ended.
        """
        planned = self.scheduler.schedule()
        counts = planned.num_scheduled_tokens
        prompts, decode_bytes = [], 0.0
        for name, count in counts.items():
            before = live[name].num_computed_tokens - count
            if count > 1:
                prompts.append((count, before))
            else:
                decode_bytes += before * self._token_bytes * self.kept
        names = list(counts)
        sampled = [
            [self._random.randrange(FIRST_TOKEN_ID, self._vocab_size)] if _is_due(live[n]) else []
            for n in names
        ]
        index = {name: place for place, name in enumerate(names)}
        self.scheduler.update_from_output(planned, ModelRunnerOutput(names, index, sampled))
        begun = {new.req_id: new.num_computed_tokens for new in planned.scheduled_new_reqs}
        seconds = self._time.of(prompts, decode_bytes, self.kept)
        return seconds, begun, [live[name] for name in names if live[name].is_finished()]


def _is_due(request: Request) -> bool:
    """Whether a step has computed all tokens that there are."""
    return bool(request.num_computed_tokens >= request.num_tokens)


def _configured(
    side: str, model: Model, args: argparse.Namespace
) -> tuple[VllmConfig, dict[str, KVCacheSpec], float, str]:
    """(configuration, spec of every layer, share of rows that queries see, cache layout)."""
    given = dict(
        model=model.served, skip_tokenizer_init=True, load_format="dummy", dtype=args.dtype,
        max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens, async_scheduling=False,
    )  # fmt: skip
    identity = ModelIdentity.from_config(model.config)
    layers = [f"model.layers.{layer}.attn" for layer in range(identity.num_layers)]
    if side == "stock":
        config = EngineArgs(**given).create_engine_config()
        config.cache_config.block_size = 16  # as on a GPU
        full = FullAttentionSpec(
            block_size=16,
            num_kv_heads=identity.num_kv_heads,
            head_size=identity.head_size,
            dtype=torch.bfloat16,
        )
        return config, dict.fromkeys(layers, full), 1.0, "LBNHC"
    register()
    options, _ = compression(side, model, args, Path(model.served).parent)
    options = replace(options, compression_admission=not args.first_come)
    given |= {"additional_config": {CONFIG_KEY: options.to_mapping()}}
    given |= {"prefix_cache_retention_interval": args.retention_interval}
    config = EngineArgs(**given).create_engine_config()
    plan = plan_of(config.additional_config)
    assert plan is not None
    geometry = plan.geometry
    specs = dict.fromkeys(layers, RecentSpec.of(geometry.block_shape, torch.bfloat16))
    specs[SEALED_NAME] = SealedSpec.of(geometry.block_shape, torch.bfloat16)
    if geometry.has_query_ring:
        specs[RING_NAME] = QueryRingSpec.of(geometry.block_shape, torch.bfloat16)
    kept = geometry.sealed_block_bytes / geometry.full_bytes(geometry.chunk_size_tokens)
    return config, specs, kept, "BLHNC"


@dataclass
class _User:
    """Who plays one conversation after the other.

    Attributes:
        script: the one in play.
        turn: of it, the next.
        history: tokens so far.
    """

    script: Script
    turn: int
    history: list[int]

    @classmethod
    def of(cls, script: Script) -> _User:
        """At the turn where the script begins."""
        past = script.turns[: script.begins_at]
        history = [*itertools.chain(*((*t.new_tokens, *t.made_up_answer) for t in past))]
        return cls(script, script.begins_at, history)


def simulate(
    engine: Engine,
    workload: Workload,
    level: Level,
    window_s: float,
    *,
    warmup_s: float = 30,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of a window, of requests whose first token comes in it.

    Args:
        engine: with an empty cache.
        workload: what is played, as `load.run_load` plays it.
        level: the users of a closed loop, whose window begins when all have had a first token, or
            the conversations a second of an open one.
        window_s: simulated.
        warmup_s: before the window of an open loop.
        seed: of the conversations, and of their arrivals.
    """
    vocab_size = engine.config.model_config.get_vocab_size()
    closed = level.kind == "closed"
    if closed:
        turns = [(0.0, True)] * int(level.amount)
    else:
        turns = open_loop(workload, level.amount, warmup_s + window_s, seed)
    due = sorted((moment, number) for number, (moment, _) in enumerate(turns))  # a heap
    joined = sum(was_there for _, was_there in turns)
    numbers = itertools.count(len(due))
    players: dict[int, _User] = {}
    live: dict[str, Request] = {}
    asked: dict[str, int] = {}
    unanswered: dict[str, float] = {}
    names = map(str, itertools.count())
    now, start, waiting = 0.0, None, set(range(joined)) if closed else set()
    found = {"requests": 0, "came": 0, "prompt_tokens": 0, "cached_tokens": 0}
    first_token_s: list[float] = []
    new_first_token_s: list[float] = []
    new: set[str] = set()
    while start is None or now < start + window_s:
        while due and due[0][0] <= now:
            due_s, number = heapq.heappop(due)
            if number not in players:
                script = make_script(workload, seed, number, vocab_size, joined=number < joined)
                players[number] = _User.of(script)
            player = players[number]
            turn = player.script.turns[player.turn]
            player.history += turn.new_tokens
            name = next(names)
            live[name] = engine.add(name, list(player.history), turn.answer_tokens, now)
            asked[name], unanswered[name] = number, due_s
            if player.turn == 0:
                new.add(name)
            found["came"] += start is not None and due_s >= start
        if not live:
            if not due:
                raise ConfigurationError(
                    "no conversation arrives any more: give a higher rate, or a longer --window-s"
                )
            now = due[0][0]
            continue
        seconds, begun, ended = engine.step(live)
        now += seconds
        answered = [name for name in unanswered if live[name].num_output_tokens]
        waiting -= {asked[name] for name in answered}
        taken_s = {name: now - unanswered.pop(name) for name in answered}
        if start is not None:
            first_token_s += taken_s.values()
            new_first_token_s += [taken_s[name] for name in new & taken_s.keys()]
            found["prompt_tokens"] += sum(live[name].num_prompt_tokens for name in begun)
            found["cached_tokens"] += sum(begun.values())
            found["requests"] += len(ended)
        for request in ended:
            number = asked.pop(request.request_id)
            del live[request.request_id]
            player = players[number]
            player.history += request.output_token_ids
            player.turn += 1
            if player.turn < len(player.script.turns):
                heapq.heappush(due, (now + player.script.turns[player.turn].think_s, number))
                continue
            del players[number]
            if closed:
                heapq.heappush(due, (now, next(numbers)))
        if start is None and not waiting and (closed or now >= warmup_s):
            start = now
    engine.scheduler.finish_requests(list(live), RequestStatus.FINISHED_ABORTED)
    return found | {
        "warmup_s": start,
        "window_s": now - start,
        "requests_per_s": found["requests"] / (now - start),
        "ttft_s": spread(first_token_s),
        "ttft_new_s": spread(new_first_token_s),
        "cached_share": found["cached_tokens"] / max(1, found["prompt_tokens"]),
    }


@tells_mistakes
def main(argv: list[str] | None = None) -> int:
    """Simulate every cell on every side."""
    made = parser()
    args = made.parse_args(argv)
    if wrong := [str(level) for _, level in args.cells if level.kind == "search"]:
        made.error(f"{wrong[0]}: closed and open loops are simulated, and rates not searched for")
    model = find_model(args.model)
    told = provenance(args, argv if argv is not None else sys.argv[1:], "simulate")
    for side, (name, level) in itertools.product(args.sides, args.cells):
        workload = WORKLOADS[name]
        if args.think_s is not None:
            workload = replace(workload, think_s=args.think_s)
        engine = Engine(side, model, args, StepTime().slower(args.slower))
        found = simulate(
            engine, workload, level, args.window_s, warmup_s=args.warmup_s, seed=args.seed
        )
        line = told | {"what": "simulation", "model": args.model, "side": side, "workload": name}
        line |= {"ratio": None if side == "stock" else args.ratio, "level": str(level)}
        line |= {"think_s": workload.think_s, "memory_gib": args.memory_gib}
        line |= {"slower": args.slower}
        line |= {"admission": type(engine.scheduler).__name__}
        line |= {"blocks": engine.config.cache_config.num_gpu_blocks}
        line |= {"retention_interval": engine.config.cache_config.prefix_cache_retention_interval}
        print(
            f"{side}, {name}, {level}, pauses of {workload.think_s:g} s: "
            f"{found['requests_per_s']:.2f} req/s, cached {found['cached_share']:.2f}",
            flush=True,
        )
        if args.out:
            append_line(args.out, json.dumps(line | found))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_model_options(made)
    made.set_defaults(dtype="bfloat16")
    add = made.add_argument
    known = {name: SIDES[name] for name in PLAYED}
    add("--sides", type=listed(known), default=["tangram"], help=", ".join(known))
    add(
        "--cells",
        type=cells_of,
        default=[("mid", Level("closed", 48))],
        help="WORKLOAD/closed:USERS or WORKLOAD/open:RATE (conversations/s), several with commas",
    )
    add("--think-s", type=float, help="mean pause before a later turn (default: the workload's)")
    add("--warmup-s", type=float, default=30, help="of an open loop, simulated")
    add("--window-s", type=float, default=100, help="simulated")
    add("--slower", type=positive, default=1, help="steps take so many times as long")
    add("--memory-gib", type=float, default=116.4, help="of the KV cache")
    add("--max-num-batched-tokens", type=int, default=8192)
    add("--max-num-seqs", type=int, default=256)
    add(
        "--retention-interval",
        type=lambda text: None if text == "dense" else int(text),
        default=0,
        help="tokens between boundaries of a prompt that stay resumable, or dense (default: 4096)",
    )
    add("--first-come", action="store_true", help="--no-compression-admission")
    add("--commit", help="where the tree is no git checkout")
    add("--out", type=output_file, help="JSON lines are appended there")
    return made


if __name__ == "__main__":
    sys.exit(main())
