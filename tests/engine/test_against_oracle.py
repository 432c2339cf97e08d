"""Below ratio 1 the engine gives what the definition says, worked out apart from it."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

from tangram.budgets import LEVELS, MEASURED
from tangram.plan.compression_plan import plan_of
from tangram.scorers import get_scorer, scorer_names
from tests import page_scorer
from tests.engine.harness import (
    DEVICE,
    MODEL,
    TOLERANCE,
    Answer,
    assert_follows,
    engine,
    few,
    generate,
)
from tests.engine.kept import KeptTokens, sealed_blocks, sealed_cache
from tests.engine.oracle import Oracle
from tests.engine.profiles import make_profile
from tests.engine.prompts import conversation_prompt, noise

CHUNK_SIZES = (64, 256)
RULE_LEVELS = [level for level in LEVELS if level != MEASURED]
SCORERS = [name for name in scorer_names() if not get_scorer(name).stores_scores]
"""Those that need no file: `test_gates.py` has the others."""
MOST_DIFFERING_ROWS = 0.02
"""Share of an engine's rows in half precision that the oracle in float32 would not have kept; 0.003
was the most seen."""


def dtype_of(llm) -> str:
    return str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")


def make_oracle(llm, profile=None, model=MODEL) -> Oracle:
    """The oracle of what the engine says that it serves."""
    plan = plan_of(llm.llm_engine.vllm_config.additional_config)
    geometry = plan.geometry
    statistics = profile and [
        {name: torch.from_numpy(array.copy()) for name, array in layer.items()}
        for layer in map(profile.layer_statistics, range(geometry.num_layers))
    ]
    # Norms carry less rounding noise than products do, and lie closer together.
    noise = TOLERANCE[dtype_of(llm)].score * (0.1 if plan.scorer_name == "key_norm" else 1)
    return Oracle(
        model,
        geometry.head_groups,
        plan.scorer,
        chunk_size_tokens=geometry.chunk_size_tokens,
        window_size_tokens=geometry.window_size_tokens,
        n_sink_tokens=geometry.n_sink_tokens,
        statistics=statistics,
        score_noise=noise,
        # A cosine or a log score near zero is a sum of larger terms, and its error is theirs.
        score_floor=0.3 if plan.scorer_name in ("key_diff", "kvzap") else 0.0,
    )


def check(
    llm, prompts, *, max_tokens, profile=None, model=MODEL, prompt_logprobs=True
) -> tuple[Oracle, list[Answer]]:
    """Every log-probability of every prompt and answer is the oracle's.

    In float32, where two scores at a cut-off are so close that rounding noise decides between
    them, the engine is held to the oracle up to that chunk's boundary. Of the positions that see
    sealed rows at all, at least a fifth has to be compared, else the prompts are badly chosen and
    the test fails.

    In half precision there is such a cut-off in almost every chunk. What the engine kept is read
    from its pages, and the oracle takes it over, after it has held every choice to its own scores:
    every position is compared.
    """
    dtype = dtype_of(llm)
    oracle = make_oracle(llm, profile, model)
    with sealed_blocks(llm) as blocks:
        answers = generate(llm, prompts, max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
    compared = total = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        if dtype != "float32":
            oracle.chosen = KeptTokens(sealed_cache(llm), blocks[tuple(prompt)])
        logprobs = oracle.logprobs(prompt + answer.tokens)
        length = len(logprobs) - 1
        unclear = [(chunk + 1) * oracle.C for _, _, chunk in oracle.close_calls]
        clear_until = min(unclear, default=length)
        assert_follows(answer, prompt, logprobs, clear_until, dtype)
        first = max(oracle.C, 0 if prompt_logprobs else len(prompt) - 1)
        compared += max(0, min(clear_until, length) - first)
        total += max(0, length - first)
    assert total > 0 and compared > total / 5, (compared, total)
    if dtype != "float32":
        assert compared == total and oracle.kept_rows > 0
        assert oracle.differing_rows <= MOST_DIFFERING_ROWS * oracle.kept_rows
    return oracle, answers


@pytest.fixture(scope="module")
def profile_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    paths = {}
    for scorer in SCORERS:
        paths[scorer] = folder / f"{scorer}.safetensors"
        make_profile(scorer).save(paths[scorer])
    return paths


@pytest.mark.parametrize(
    "scorer, level, chunk_size",
    few(
        product(SCORERS, RULE_LEVELS, CHUNK_SIZES),
        [
            ("streaming_llm", "perlayer", 256),
            ("key_norm", "crosslayer", 64),
            ("tova", "mass", 64),
            ("expected_attention", "error", 64),
            ("learned", "crosslayer", 64),
        ],
    ),
)
def test_engine_follows_the_oracle(scorer, level, chunk_size, profile_paths):
    profile = make_profile(scorer)
    with engine(
        compression_ratio=0.3,
        compression_scorer=scorer,
        compression_level=level,
        compression_profile=str(profile_paths[scorer]),
        compression_chunk_size=chunk_size,
        page_group_size=2,
    ) as llm:
        prompts = [conversation_prompt(1, 2 * chunk_size + 90), noise(2, 2 * chunk_size - 20)]
        prompts.append(noise(3, 3 * chunk_size + 7))
        oracle, _ = check(llm, prompts, max_tokens=30, profile=profile)
        pages = oracle.head_groups.pages
    assert level == "uniform" or len({count for layer in pages for count in layer}) > 1
    assert any(not kept.all() for kept in oracle.kept)


GEOMETRIES = [
    dict(compression_window_size=0),
    dict(compression_window_size=1, compression_scorer="tova"),
    dict(compression_window_size=48, compression_scorer="snap_kv"),
    dict(compression_n_sink_tokens=0),
    dict(compression_n_sink_tokens=16, compression_ratio=0.25),
    dict(compression_ratio=0.93, page_group_size=1),
    dict(page_group_size=4, compression_chunk_size=128),
    dict(compression_chunk_size=96, compression_window_size=20),
]


@pytest.mark.parametrize(
    "options",
    few(GEOMETRIES, [GEOMETRIES[2]]),
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_other_geometries_follow_the_oracle(options):
    with engine(**{"compression_chunk_size": 64, "compression_ratio": 0.5, **options}) as llm:
        check(llm, [conversation_prompt(3, 330), noise(4, 129)], max_tokens=5)


def test_a_scorers_parameters_follow_the_oracle():
    with engine(
        compression_chunk_size=64,
        compression_ratio=0.5,
        compression_scorer="snap_kv",
        compression_scorer_parameters={"kernel_size": 3},
    ) as llm:
        oracle, _ = check(llm, [conversation_prompt(3, 330), noise(4, 129)], max_tokens=5)
        assert oracle.scorer == get_scorer("snap_kv", kernel_size=3)


@pytest.mark.parametrize(
    "scorer",
    few(
        ["key_diff", "snap_kv", "tova", "expected_attention", "learned"],
        ["key_diff", "snap_kv", "expected_attention", "learned"],
    ),
)
def test_a_long_answer_is_sealed_as_it_grows(scorer, profile_paths):
    profile, options = None, {}
    if get_scorer(scorer).needs_statistics:
        profile = make_profile(scorer)
        options["compression_profile"] = str(profile_paths[scorer])
        options["compression_level"] = "uniform"
    with engine(
        compression_ratio=0.25,
        compression_chunk_size=64,
        compression_scorer=scorer,
        **options,
        **DEVICE.graphs,
    ) as llm:
        prompts = [noise(5, 50), noise(6, 63), noise(7, 64)]
        oracle, _ = check(llm, prompts, max_tokens=220, profile=profile)
        assert oracle.kept[0].any(dim=0).sum() > 0


@pytest.mark.parametrize("scorer", few(["key_diff", "snap_kv"], ["snap_kv"]))
def test_turns_that_hit_the_cache_in_mixed_steps_follow_the_oracle(scorer):
    """Steps of some requests' answers and parts of others' prompts; then all history is cached."""
    with engine(
        compression_ratio=0.25,
        compression_chunk_size=64,
        compression_scorer=scorer,
        max_num_batched_tokens=100,
    ) as llm:
        prompts = [conversation_prompt(1, 330), noise(12, 120), noise(13, 63)]
        _, answers = check(llm, prompts, max_tokens=40, prompt_logprobs=False)
        assert [answer.cached_tokens for answer in answers] == [0, 0, 0]
        prompts = [
            prompt + answer.tokens + noise(14, 70)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        _, later = check(llm, prompts, max_tokens=20, prompt_logprobs=False)
    for prompt, answer in zip(prompts, later, strict=True):
        assert answer.cached_tokens == (len(prompt) - 71) // 64 * 64


@pytest.mark.skipif(DEVICE.dtype != "float32", reason="there all tests are in half precision")
def test_half_precision_follows_the_oracle():
    with engine(
        compression_ratio=0.25,
        compression_chunk_size=64,
        compression_scorer="key_norm",
        dtype="float16",
    ) as llm:
        oracle, _ = check(llm, [conversation_prompt(1, 330), noise(3, 199)], max_tokens=20)
    assert oracle.differing_rows > 0, "rounding tipped no choice: the case shows nothing"


def test_a_scorer_of_another_package_follows_the_oracle(tmp_path, monkeypatch):
    """No kernel knows it, on any device."""
    page_scorer.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with engine(
        compression_ratio=0.3, compression_chunk_size=64, compression_scorer="value_norm"
    ) as llm:
        assert not sealed_cache(llm).runner.is_device
        check(llm, [conversation_prompt(3, 330), noise(4, 129)], max_tokens=20)


ARCHITECTURES = {
    "LlamaForCausalLM": dict(model_type="llama"),
    "Qwen2ForCausalLM": dict(model_type="qwen2"),
    "Qwen3ForCausalLM": dict(model_type="qwen3"),
    "MistralForCausalLM": dict(model_type="mistral", sliding_window=None),
    "Phi3ForCausalLM": dict(model_type="phi3", sliding_window=None, pad_token_id=0),
    # Its scores are not divided by the root of the head size.
    "GraniteForCausalLM": dict(model_type="granite", attention_multiplier=0.11),
    "Qwen3MoeForCausalLM": dict(
        model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
}


# The model of the other tests is a Qwen3.
@pytest.mark.parametrize(
    "architecture", few(ARCHITECTURES, ["LlamaForCausalLM", "Qwen2ForCausalLM"])
)
def test_architectures_follow_the_oracle(architecture, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(ARCHITECTURES[architecture])
    kind = sizes.pop("model_type")
    config = AutoConfig.for_model(
        kind,
        hidden_size=4 * DEVICE.head_size,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=DEVICE.head_size,
        vocab_size=512,
        max_position_embeddings=2048,
        architectures=[architecture],
        tie_word_embeddings=False,
        **sizes,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == kind
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(512, (n,), generator=generator).tolist() for n in (300, 150)]
    with engine(
        model=str(tmp_path),
        skip_tokenizer_init=True,
        max_model_len=1024,
        compression_ratio=0.3,
        compression_chunk_size=64,
    ) as llm:
        check(llm, prompts, max_tokens=20, model=tmp_path)
