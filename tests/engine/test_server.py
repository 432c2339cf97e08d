"""A real server with compression on keeps giving right answers, whatever its clients do."""

import argparse
import asyncio
import dataclasses
import json
import os
import re
import time
from pathlib import Path

import httpx
import openai
import pytest
import torch

from benchmarks.serving.client import DIALOGUES, Run
from benchmarks.serving.load import Level, Phases, run_load
from benchmarks.serving.sides import SERVED_NAME, find_model
from benchmarks.serving.soak import failures, soak
from benchmarks.serving.workloads import WORKLOADS
from tangram.conversations import is_right, make_conversation
from tangram.geometry import BlockCount, Geometry
from tangram.plan.compression_plan import make_plan
from tangram.plan.options import CompressionOptions
from tangram.serving.server import Server
from tests.engine.harness import DEVICE, MODEL, assert_close
from tests.engine.profiles import identity, make_profile
from tests.engine.prompts import noise

ITEMSIZE_BYTES = getattr(torch, DEVICE.dtype).itemsize
CACHE_BYTES = ITEMSIZE_BYTES * (6 << 20)
CHUNK = 128
ROOT = Path(__file__).resolve().parents[2]
CONTEXT_TOKENS = 600
MAX_MODEL_LEN = 1024
SOAK_MINUTES = float(os.environ.get("TANGRAM_SOAK_MINUTES", "0.15"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    log, profile = folder / "server.log", folder / "made-up.profile"
    make_profile("key_diff").save(profile)
    arguments = [
        MODEL, "--served-model-name", "recall", SERVED_NAME, "--enable-compression",
        "--enable-prompt-tokens-details",
        "--compression-ratio", "0.5", "--compression-chunk-size", str(CHUNK),
        "--compression-profile", str(profile), "--compression-level", "uniform",
        "--compression-drift-sample", "2",
        "--dtype", DEVICE.dtype, "--enforce-eager", "--max-model-len", str(MAX_MODEL_LEN),
        "--max-num-batched-tokens", "512", "--kv-cache-memory-bytes", str(CACHE_BYTES),
        *(part for option in DEVICE.options.items() for part in flag(*option)),
    ]  # fmt: skip
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with Server("the test's server", arguments, log, environment) as running:
        running.wait_until_healthy(timeout_s=180)
        yield running


def flag(option: str, value: object) -> tuple[str, str]:
    """As a server takes what `vllm.LLM` takes."""
    text = json.dumps(value) if isinstance(value, dict) else str(value)
    return "--" + option.replace("_", "-"), text


def client(server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)


async def play(api: openai.AsyncOpenAI, seed: int, turns: int = 3) -> tuple[int, int]:
    """(right, asked) of a conversation whose client sends the whole history every turn."""
    conversation = make_conversation(seed, context_tokens=CONTEXT_TOKENS, facts=6, turns=turns)
    answers: list[str] = []
    for turn in range(turns):
        response = await api.chat.completions.create(
            model="recall",
            messages=conversation.messages(turn, answers),
            max_tokens=8,
            temperature=0,
        )
        answers.append(response.choices[0].message.content or "")
    right = sum(
        is_right(answer, turn.answer)
        for answer, turn in zip(answers, conversation.turns, strict=True)
    )
    return right, turns


async def play_many(server, seeds, turns=3) -> float:
    """Share of right answers of conversations played all at once."""
    async with client(server) as api:
        results = await asyncio.gather(*(play(api, seed, turns) for seed in seeds))
    return sum(right for right, _ in results) / sum(asked for _, asked in results)


def metric(server, name: str) -> float:
    values = [
        float(line.rpartition(" ")[2])
        for line in server.get("/metrics").splitlines()
        if line.startswith(name + "{") or line.startswith(name + " ")
    ]
    assert values, f"no metric {name}"
    return sum(values)


def assert_idle(server) -> None:
    """Nothing runs, nothing waits, no block is held."""
    for _ in range(100):
        running = metric(server, "vllm:num_requests_running")
        if running + metric(server, "vllm:num_requests_waiting") == 0:
            break
        asyncio.run(asyncio.sleep(0.1))
    assert metric(server, "vllm:num_requests_running") == 0
    assert metric(server, "vllm:num_requests_waiting") == 0
    assert metric(server, "vllm:kv_cache_usage_perc") == 0


def test_compression_is_active_and_answers_are_right(server):
    assert "KV cache compression: ratio 0.5" in server.log_text()
    hits = metric(server, "vllm:prefix_cache_hits_total")
    assert asyncio.run(play_many(server, range(4))) >= 0.9
    assert metric(server, "vllm:prefix_cache_hits_total") > hits
    assert_idle(server)


def test_clients_that_disconnect_lose_nothing_of_the_others(server):
    async def hang_up(seed: int, after_s: float) -> None:
        conversation = make_conversation(seed, context_tokens=CONTEXT_TOKENS, facts=6, turns=1)
        body = {
            "model": "recall", "messages": conversation.messages(0), "max_tokens": 300,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        async with httpx.AsyncClient(base_url=server.url, trust_env=False) as http:
            try:
                async with asyncio.timeout(after_s):
                    async with http.stream("POST", "/v1/chat/completions", json=body) as response:
                        async for _ in response.aiter_bytes():
                            pass
            except TimeoutError:
                return
        pytest.fail("the answer ended before the client hung up")

    async def both() -> float:
        leaving = [hang_up(seed, (0.15 + 0.1 * seed) * DEVICE.pace) for seed in range(6)]
        shares = await asyncio.gather(play_many(server, range(10, 16)), *leaving)
        return shares[0]

    assert asyncio.run(both()) >= 0.9
    assert_idle(server)


def test_a_prompt_that_is_too_long_is_refused_with_the_limit(server):
    async def ask() -> None:
        conversation = make_conversation(1, context_tokens=3000, facts=6, turns=1)
        async with client(server) as api:
            await api.chat.completions.create(
                model="recall", messages=conversation.messages(0), max_tokens=8
            )

    with pytest.raises(openai.BadRequestError) as error:
        asyncio.run(ask())
    assert str(MAX_MODEL_LEN) in str(error.value)
    assert asyncio.run(play_many(server, [20])) == 1
    assert_idle(server)


def test_prompt_logprobs_are_the_same_whatever_the_cache_holds(server):
    """As lm-evaluation-harness asks for them: every token of a prompt of several chunks.

    The cache is not read for them, because a hit would leave the tokens that it covers without.
    """
    prompt = noise(8, 4 * CHUNK + 10)

    async def ask() -> list[float | None]:
        async with client(server) as api:
            answer = await api.completions.create(
                model="recall", prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=1
            )
        return answer.choices[0].logprobs.token_logprobs

    async def read_the_cache() -> int:
        async with client(server) as api:
            answer = await api.completions.create(model="recall", prompt=prompt, max_tokens=1)
        return answer.usage.prompt_tokens_details.cached_tokens

    first = asyncio.run(ask())
    assert asyncio.run(read_the_cache()) == 4 * CHUNK
    again = asyncio.run(ask())
    assert len(first) == len(again) == len(prompt) + 1
    assert first[0] is again[0] is None
    differences = [abs(a - b) for a, b in zip(first[1:], again[1:], strict=True)]
    assert_close(differences, DEVICE.dtype)
    assert_idle(server)


def test_sixty_four_clients_at_once(server):
    """More than the cache holds: the pool has room for about a third of them."""
    assert asyncio.run(play_many(server, range(100, 164), turns=2)) >= 0.9
    assert_idle(server)


def compression_metrics(server) -> dict[str, float]:
    """`tangram:` metrics without that prefix, blocks by kind, all of one scrape."""
    found = {}
    for line in server.get("/metrics").splitlines():
        match = re.match(r'tangram:(\w+)\{(?:.*kind="(\w+)")?.*\} (\S+)$', line)
        if match:
            name, kind, value = match.groups()
            found[kind or name] = float(value)
    return found


def layout() -> Geometry:
    options = CompressionOptions(compression_ratio=0.5, compression_chunk_size=CHUNK)
    return make_plan(options, identity(), ITEMSIZE_BYTES).geometry


def assert_one_request(found: dict[str, float], num_prompt: int) -> int:
    """The metrics are those of one decoding request; gives its tokens."""
    g = layout()
    blocks = BlockCount(*(int(found[kind]) for kind in BlockCount._fields))
    tokens, rest = divmod(found["saved_bytes"] + g.pool_bytes(blocks.total), g.token_bytes)
    assert rest == 0 and tokens >= num_prompt
    tokens = int(tokens)
    # Blocks that a step makes needless are given back when the next one is scheduled: with async
    # scheduling that is one step later.
    after_prompt = tokens - num_prompt
    allowed = [g.blocks_held(tokens, tokens - 1)] if after_prompt else []
    allowed += [g.blocks_held(tokens, 0)] if after_prompt <= 1 else []
    assert blocks in allowed
    rows = g.retained_rows(tokens // CHUNK, 1)
    assert (found["retained_rows"], found["retained_bytes"]) == (rows, rows * g.row_bytes)
    return tokens


def test_metrics_are_those_of_the_geometry(server):
    # An answer long enough for several scrapes, which a busy server answers late.
    g, prompt, answer = layout(), noise(7, 3 * CHUNK + 10), 600
    before = compression_metrics(server)
    assert before["block_bytes"] == g.block_bytes
    assert before["free"] == CACHE_BYTES // g.block_bytes - 1
    assert not any(before[name] for name in (*BlockCount._fields, "retained_rows", "saved_bytes"))
    assert f'layout="{g.digest}"' in server.get("/metrics")

    async def complete(api) -> None:
        await api.completions.create(
            model="recall", prompt=prompt, max_tokens=answer, extra_body={"ignore_eos": True}
        )

    async def watch() -> list[dict[str, float]]:
        seen = []
        async with client(server) as api:
            running = asyncio.create_task(complete(api))
            while not running.done():
                seen.append(await asyncio.to_thread(compression_metrics, server))
                await asyncio.sleep(0.1)
            await running
        return seen

    seen = [found for found in asyncio.run(watch()) if found["retained_rows"]]
    tokens = [assert_one_request(found, len(prompt)) for found in seen]
    assert len(set(tokens)) >= 2 and tokens == sorted(tokens)
    assert_idle(server)
    after = compression_metrics(server)
    chunks = (len(prompt) + answer - 1) // CHUNK
    assert after["chunks_sealed_total"] - before["chunks_sealed_total"] == chunks
    assert after["free"] == before["free"] and after["retained_rows"] == 0

    # The same again finds the prompt's chunks in the prefix cache: only the answer's are sealed.
    asyncio.run(watch())
    assert_idle(server)
    again = compression_metrics(server)["chunks_sealed_total"] - after["chunks_sealed_total"]
    assert again == chunks - len(prompt) // CHUNK


def test_the_dashboard_asks_for_metrics_that_are_there(server):
    dashboard = json.loads((ROOT / "docs" / "grafana" / "tangram.json").read_text())
    queries = [
        target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())
    ]
    asked = {name for query in queries for name in re.findall(r"(?:vllm|tangram):\w+", query)}
    exposed = set(re.findall(r"^([\w:]+)[{ ]", server.get("/metrics"), re.MULTILINE))
    assert len(asked) > 20
    assert asked - exposed == set()


def test_drift_of_the_worker_reaches_the_metrics(server):
    before = metric(server, "tangram:drift_sampled_chunks_total")
    asyncio.run(play_many(server, [30, 31], turns=1))
    assert_idle(server)
    assert metric(server, "tangram:drift_sampled_chunks_total") > before
    # The profile's shares are made up, so the text must look foreign.
    assert metric(server, "tangram:drift_deviation") > metric(server, "tangram:drift_limit")


def test_the_periodic_log_tells_of_compression(server):
    deadline = time.monotonic() + 15
    while "KV compression: " not in server.log_text() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert re.search(r"KV compression: .* chunks sealed: \d+ new", server.log_text())


SHORT = WORKLOADS["short"].scaled(0.04)


@pytest.mark.parametrize("api", DIALOGUES)
def test_the_serving_benchmark_plays_against_it(server, api):
    """Later turns hit the history, the server's own answers in it, as whole chunks of it."""
    model = find_model("recall", folder=None)
    # A window long enough for some turns where every core is taken twice.
    phases = Phases(warmup_s=0.2, warmup_most_s=20, window_s=8, drain_s=20)

    async def load():
        async with Run(server.url, SERVED_NAME, DIALOGUES[api], seed=5) as run:
            level = Level("closed", 2)
            workload = dataclasses.replace(SHORT, think_s=0.1)
            return run, await run_load(run, workload, level, phases, vocab_size=model.vocab_size)

    run, found = asyncio.run(load())
    assert {record.outcome for record in run.records} == {"done"}, found
    assert found["all_users_answered"] and found["ttft_s"]["count"] > 2
    assert found["output_tokens_per_s"] > 0 and found["counters"]["prefix_cache_hits"] > 0
    assert all(record.cached_tokens is not None for record in run.records)
    by_turn = {(r.conversation, r.turn): r for r in run.records}
    later = [r for r in run.records if (r.conversation, r.turn - 1) in by_turn]
    assert later
    for record in later:
        before = by_turn[record.conversation, record.turn - 1]
        history = before.prompt_tokens + before.output_tokens
        if api == "tokens":
            assert record.prompt_tokens > history
            # An answer's last token is never computed, and a chunk that its last step of one token
            # completes is never told to the cache.
            found_tokens = history - 1 - (before.output_tokens > 1)
            assert record.cached_tokens == found_tokens // CHUNK * CHUNK
        else:  # what stands for the end of an answer is no part of its text
            assert record.prompt_tokens > before.prompt_tokens
            assert record.cached_tokens >= before.prompt_tokens // CHUNK * CHUNK
    assert_idle(server)


def test_a_soak_leaves_nothing_behind(server):
    """Twice what it can take, with clients that leave; TANGRAM_SOAK_MINUTES=1 for a longer one."""
    model = find_model("recall", folder=None)
    options = argparse.Namespace(
        minutes=SOAK_MINUTES, rate=2.0, abort_share=0.25, api="tokens", seed=3, drain_s=2.0
    )
    found = asyncio.run(soak(server, model, SHORT, options))
    assert failures(found) == [], found
    assert found["outcomes"]["aborted"] > 3 and found["outcomes"]["done"] > 3, found
    assert found["right_meanwhile"] >= 0.9


@pytest.mark.thorough
def test_options_through_additional_config_are_refused_like_the_flags(tmp_path):
    config = json.dumps({"tangram": {"compression_ratio": 3}})
    arguments = [MODEL, "--additional-config", config, "--dtype", "float32"]
    with Server("a refused server", arguments, tmp_path / "log") as refused:
        code = refused._process.wait(timeout=120)
        assert code != 0
        assert "--compression-ratio is 3" in refused.log_text()
        assert "Uvicorn running" not in refused.log_text()
