"""One engine under measurement, in a process of its own; `bench_engine.py` starts it.

    python -m benchmarks.engine.side JSON

JSON is the job: which engine, and what to measure. Prints one JSON line a result, marked so that it
is found among what vLLM prints.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from typing import Any

import numpy as np

MARK = "RESULT "
STEP_TOKENS = 8192
WARM_TOKENS = 300


class Side:
    """An engine and what can be measured of it."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        import tangram

        self.compression = job.get("compression")
        cls = LLM if self.compression is None else tangram.LLM
        started = time.monotonic()
        self.llm = cls(
            job["model"],
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=job["max_model_len"],
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=256,
            gpu_memory_utilization=job["gpu_memory_utilization"],
            enable_prefix_caching=True,
            disable_log_stats=False,
            seed=0,
            **(self.compression or {}),
            **job.get("engine", {}),
        )
        self.start_s = time.monotonic() - started
        self._requests = 0
        self._answered: dict[str, Any] = {}
        self._histories: dict[tuple[int, int], list[list[int]]] = {}
        self._draw = np.random.default_rng(job["seed"])
        self.ask(self.prompts(8, 600), 40)  # whatever is compiled at first use

    def prompts(self, count: int, tokens: int) -> list[list[int]]:
        """Prompts that share nothing."""
        return self._draw.integers(10, 100_000, (count, tokens)).tolist()

    def ask(self, prompts: list[list[int]], max_tokens: int) -> list[Any]:
        """Answers of a fixed length."""
        from vllm import SamplingParams

        return self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False),
            use_tqdm=False,
        )

    def capacity(self, context: int) -> dict[str, Any]:
        """Requests of a length that the pool holds at once, and their tokens."""
        from tangram.plan.capacity import most_blocks
        from tangram.plan.compression_plan import plan_of

        config = self.llm.llm_engine.vllm_config
        blocks = config.cache_config.num_gpu_blocks - 1
        plan = plan_of(config.additional_config)
        if plan is None:
            held = -(-context // config.cache_config.block_size)
        else:
            held = most_blocks(plan.geometry, context)
        return {
            "blocks": blocks,
            "requests": blocks // held,
            "tokens": int(blocks / held * context),
            "layout": None if plan is None else plan.geometry.digest,
        }

    def first_token(self, tokens: int, repeats: int) -> dict[str, Any]:
        """Time from a prompt that nobody has seen to its first token, alone on the engine."""
        times = []
        for prompt in self.prompts(repeats, tokens):
            start = time.perf_counter()
            self.ask([prompt], 1)
            times.append(time.perf_counter() - start)
        return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}

    def decode_step(self, requests: int, context: int, repeats: int) -> dict[str, Any]:
        """Mean time of a step of one token for each of a number of requests.

        Prompts are read before. The time is that of the request that starts last, from its first
        token to its last, so that no step with a prompt's tokens is in it; the context is the
        prompt and half of the answer.
        """
        prompts = self.prompts(requests, context - WARM_TOKENS // 2)
        self.ask(prompts, 1)
        return self._steps(prompts, repeats)

    def _steps(self, prompts: list[list[int]], repeats: int) -> dict[str, Any]:
        """Of prompts that are cached."""
        steps = []
        for _ in range(repeats):
            stats = [output.metrics for output in self.ask(prompts, WARM_TOKENS + 1)]
            last = max(stats, key=lambda s: s.first_token_ts)
            steps.append((last.last_token_ts - last.first_token_ts) / WARM_TOKENS * 1e3)
        return {"step_ms": statistics.median(steps), "steps_ms": steps}

    def uneven_decode_step(self, lengths: list[int], repeats: int) -> dict[str, Any]:
        """Mean time of a step of one token for each of some requests of different lengths."""
        prompts = [self.prompts(1, tokens - WARM_TOKENS // 2)[0] for tokens in lengths]
        self.ask(prompts, 1)
        return self._steps(prompts, repeats)

    def follow_up(self, cached: int, new: int, decodes: int, repeats: int) -> dict[str, Any]:
        """Time to the first token of next turns, each alone beside requests that decode.

        A history is found in the cache as far as hits go: to a multiple of the chunk size with
        compression, of the block size without. Histories end half a chunk behind one on average.
        The requests that decode have 2,000 tokens, and are answered all the while.
        """
        histories = self._read(cached, repeats + 1)
        running = [self._add(prompt, 4096) for prompt in self.prompts(decodes, 2000)]
        for request in running:
            self._step_until_answered(request)
        times, found = [], []
        for history, turn in zip(histories, self.prompts(repeats + 1, new), strict=True):
            start = time.perf_counter()
            # One token more, so that the first is not the last, with which the engine is at rest.
            request = self._add(history + turn, 2)
            output = self._step_until_answered(request)
            times.append((time.perf_counter() - start) * 1e3)
            found.append(output.num_cached_tokens)
            while not self._answered[request].finished:
                self._step()
        if running:
            self.llm.llm_engine.abort_request(running)
        times = times[1:]  # the first one finds something cold
        return {
            "median_ms": statistics.median(times),
            "times_ms": times,
            "num_cached_tokens": found[1:],
        }

    def _read(self, cached: int, count: int) -> list[list[int]]:
        """Histories of `follow_up` that the cache holds, the same ones each time."""
        if (cached, count) not in self._histories:
            extra = (112, 128)
            made = [self.prompts(1, cached + extra[index % 2])[0] for index in range(count)]
            self.ask(made, 1)
            self._histories[cached, count] = made
        return self._histories[cached, count]

    def _add(self, prompt: list[int], max_tokens: int) -> str:
        from vllm import SamplingParams

        self._requests += 1
        name = f"request-{self._requests}"  # what is returned is another name, of the engine's own
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": prompt},
            SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, detokenize=False),
        )
        return name

    def _step_until_answered(self, request: str) -> Any:
        """Run the engine until a request has its first token."""
        while request not in self._answered:
            self._step()
        return self._answered[request]

    def _step(self) -> None:
        for output in self.llm.llm_engine.step():
            self._answered[output.request_id] = output

    def throughput(self, requests: int, tokens: int, answer: int, turns: int) -> dict[str, Any]:
        """Output tokens a second with all requests at once, the first time and in later turns.

        A later turn's prompt is the whole history, 64 new tokens behind it.
        """
        histories, result = self.prompts(requests, tokens), []
        for _ in range(turns):
            start = time.perf_counter()
            outputs = self.ask(histories, answer)
            elapsed = time.perf_counter() - start
            cached = sum(output.num_cached_tokens or 0 for output in outputs)
            stats = [output.metrics for output in outputs]
            result.append(
                {
                    "seconds": elapsed,
                    "output_tokens_per_s": requests * answer / elapsed,
                    "cached_share": cached / sum(map(len, histories)),
                    "step_ms": statistics.median(
                        (s.last_token_ts - s.first_token_ts) / (answer - 1) * 1e3 for s in stats
                    ),
                    "preemptions": sum(s.num_preemptions for s in stats),
                }
            )
            histories = [
                history + list(output.outputs[0].token_ids) + more
                for history, output, more in zip(
                    histories, outputs, self.prompts(requests, 64), strict=True
                )
            ]
        return {"turns": result}


def main() -> None:
    """Do the job."""
    job = json.loads(sys.argv[1])
    side = Side(job)
    _tell({"what": "start", "seconds": side.start_s})
    for task in job["tasks"]:
        name, arguments = task["what"], task["arguments"]
        result = getattr(side, name)(**arguments)
        _tell({"what": name, "key": task.get("key", name), **arguments, **result})


def _tell(line: dict[str, Any]) -> None:
    print(MARK + json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
