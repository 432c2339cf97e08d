"""What serving meets beside plain answers: grammars, tools, sleep and weights that change."""

import json
import re
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file, save_file

from tangram.serving.server import Server
from tests.engine.harness import DEVICE, MODEL, assert_same, engine, generate
from tests.engine.prompts import chat, conversation_prompt, noise

CHUNK = 64
# Else a model of this size writes white space for ever.
NO_BLANKS = {"backend": "xgrammar", "disable_any_whitespace": True}
HALF = dict(
    compression_ratio=0.5, compression_chunk_size=CHUNK, structured_outputs_config=NO_BLANKS
)
NUMBERS = 30
SCHEMA = {
    "type": "object",
    "properties": {
        "codes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 10, "maximum": 99},
            "minItems": NUMBERS,
            "maxItems": NUMBERS,
        }
    },
    "required": ["codes"],
    "additionalProperties": False,
}
PATTERN = r"([0-9]{2} ){40}end"
# Of xgrammar, about how vLLM calls it.
pytestmark = pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")
GRAMMARS = [{"json": SCHEMA}, {"regex": PATTERN}]


def reset(llm) -> None:
    assert llm.reset_prefix_cache()


def constrained(llm, prompts):
    """Greedy answers that obey a grammar each: (tokens, text, tokens of the prompt cached)."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    parameters = [
        SamplingParams(
            max_tokens=300, temperature=0, structured_outputs=StructuredOutputsParams(**grammar)
        )
        for grammar in GRAMMARS
    ]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, parameters, use_tqdm=False)
    return [
        (list(o.outputs[0].token_ids), o.outputs[0].text, o.num_cached_tokens or 0) for o in outputs
    ]


def assert_obeys(answers) -> None:
    codes = json.loads(answers[0][1])["codes"]
    assert len(codes) == NUMBERS and all(10 <= code <= 99 for code in codes)
    assert re.fullmatch(PATTERN, answers[1][1])


def constrained_turns(llm):
    """Two turns of a chat and of noise, chunks sealed before and during every answer."""
    prompts = [conversation_prompt(3, context_tokens=400), noise(3, 2 * CHUNK + 40)]
    first = constrained(llm, prompts)
    assert_obeys(first)
    histories = [prompt + tokens for prompt, (tokens, _, _) in zip(prompts, first, strict=True)]
    for prompt, history in zip(prompts, histories, strict=True):
        assert len(prompt) > 2 * CHUNK and len(history) // CHUNK > len(prompt) // CHUNK
    second = constrained(llm, [history + noise(4, 30) for history in histories])
    assert_obeys(second)
    for history, (_, _, cached_tokens) in zip(histories, second, strict=True):
        assert cached_tokens >= (len(history) - 2) // CHUNK * CHUNK
    return first + second


def test_constrained_answers_are_those_of_vllm_where_all_is_kept():
    with engine(compressed=False, block_size=CHUNK, structured_outputs_config=NO_BLANKS) as llm:
        stock = constrained_turns(llm)
    with engine(**HALF | {"compression_ratio": 1.0}) as llm:
        whole = constrained_turns(llm)
    if DEVICE.dtype == "float32":
        assert [tokens for tokens, _, _ in whole] == [tokens for tokens, _, _ in stock]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    """The recall model with other projections of keys."""
    folder = tmp_path_factory.mktemp("other")
    for file in Path(MODEL).iterdir():
        if file.suffix in (".json", ".jinja"):
            (folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    weights = load_file(Path(MODEL) / "model.safetensors")
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            change = torch.randn(weight.shape, generator=generator) * weight.float().std()
            weights[name] = (weight.float() + 0.5 * change).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def half():
    # Where there is no sleep mode, vLLM forgets the cache all the same.
    with engine(**HALF, enable_sleep_mode=DEVICE.has_kernels) as llm:
        yield llm


def test_constrained_answers_obey_their_grammar_at_half_the_cache(half):
    constrained_turns(half)


def test_answers_after_a_sleep_are_those_before(half):
    reset(half)
    prompts = [noise(seed, 4 * CHUNK + 20) for seed in (1, 2)]
    before = generate(half, prompts)
    half.sleep(level=1)
    half.wake_up()
    after = generate(half, prompts)
    assert [answer.cached_tokens for answer in after] == [0, 0]
    assert_same(after, before)
    again = generate(half, prompts)
    assert [answer.cached_tokens for answer in again] == [4 * CHUNK] * 2
    assert_same(again, before)


def test_new_weights_and_a_cache_that_is_reset_answer_as_an_engine_of_theirs(half, other_model):
    """vLLM leaves the cache alone when weights change: whoever changes them resets it."""
    prompts = [conversation_prompt(seed, context_tokens=300) for seed in (1, 2)]
    reset(half)
    old = generate(half, prompts)
    half.collective_rpc("reload_weights", kwargs={"weights_path": other_model})
    reset(half)
    new = generate(half, prompts)
    again = generate(half, prompts)
    half.collective_rpc("reload_weights", kwargs={"weights_path": MODEL})
    reset(half)
    back = generate(half, prompts)
    with engine(model=other_model, **HALF) as llm:
        expected = generate(llm, prompts)
    assert [a.tokens for a in expected] != [a.tokens for a in old]
    whole_chunks = [(len(prompt) - 1) // CHUNK * CHUNK for prompt in prompts]
    assert [answer.cached_tokens for answer in new + again] == [0, 0, *whole_chunks]
    assert_same(new, expected)
    assert_same(again, expected)
    assert_same(back, old)


TEMPLATE = """
{%- if tools -%}<|system|> tools: {{ tools | tojson }}<|end|>{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|>{{ message.content or '' }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{{- '</tool_call>' }}
{%- endfor -%}<|end|>
{%- elif message.role == 'tool' -%}<|user|> <tool_response>{{ message.content }}<|end|>
{%- else -%}<|{{ message.role }}|> {{ message.content | trim }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
LOOK_UP = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "codes of a place",
        "parameters": SCHEMA,
        "strict": True,  # else vLLM leaves the arguments to the model
    },
}
CALL = (
    r'<tool_call>\{"name": "look_up", "arguments": \{"codes": \[([1-9][0-9], ){29}[1-9][0-9]\]\}\}'
    "</tool_call>"
)


@pytest.fixture(scope="module")
def tool_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    (template := folder / "tools.jinja").write_text(TEMPLATE)
    arguments = [
        MODEL, "--served-model-name", "recall", "--enable-compression",
        "--compression-ratio", "0.5", "--compression-chunk-size", str(CHUNK),
        "--compression-profile", "none",
        "--chat-template", str(template), "--enable-auto-tool-choice",
        "--tool-call-parser", "hermes", "--enable-prompt-tokens-details",
        "--structured-outputs-config", json.dumps(NO_BLANKS),
        "--dtype", DEVICE.dtype, "--enforce-eager", "--max-model-len", "4096",
        "--kv-cache-memory-bytes", str(80 << 20),
    ]  # fmt: skip
    for option, value in DEVICE.options.items():
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        arguments += ["--" + option.replace("_", "-"), text]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with Server("the tools' server", arguments, folder / "server.log", environment) as running:
        running.wait_until_healthy(timeout_s=180)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", timeout=120) as api:
            yield api


def ask(api, messages, **options):
    return api.chat.completions.create(
        model="recall", messages=messages, temperature=0, max_tokens=300, **options
    )


def assert_calls(call) -> None:
    assert call.function.name == "look_up"
    codes = json.loads(call.function.arguments)["codes"]
    assert len(codes) == NUMBERS and all(10 <= code <= 99 for code in codes)


@pytest.mark.parametrize(
    "options",
    [
        # A model of this size calls no tool of its own accord: a grammar makes it.
        dict(tool_choice="auto", extra_body={"structured_outputs": {"regex": CALL}}),
        pytest.param(dict(tool_choice="required"), marks=pytest.mark.thorough),
        dict(tool_choice={"type": "function", "function": {"name": "look_up"}}),
    ],
    ids=["auto", "required", "named"],
)
def test_tools_are_called_and_their_results_taken_up(tool_server, options):
    messages = chat(5, context_tokens=400)
    first = ask(tool_server, messages, tools=[LOOK_UP], **options)
    (call,) = first.choices[0].message.tool_calls
    assert_calls(call)
    prompt = first.usage.prompt_tokens
    assert (prompt + first.usage.completion_tokens) // CHUNK > prompt // CHUNK > 1

    messages += [first.choices[0].message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "the codes are there"}]
    # Tools of a request that calls none are rendered all the same.
    second = ask(tool_server, messages, tools=[LOOK_UP], tool_choice="none")
    assert not second.choices[0].message.tool_calls
    assert second.usage.prompt_tokens_details.cached_tokens >= prompt // CHUNK * CHUNK


def test_an_answer_obeys_the_schema_of_its_response_format(tool_server):
    form = {"type": "json_schema", "json_schema": {"name": "codes", "schema": SCHEMA}}
    messages, cached_tokens = chat(6, context_tokens=400), []
    for _ in range(2):
        answer = ask(tool_server, messages, response_format=form)
        codes = json.loads(answer.choices[0].message.content)["codes"]
        assert len(codes) == NUMBERS and all(10 <= code <= 99 for code in codes)
        cached_tokens.append(answer.usage.prompt_tokens_details.cached_tokens)
        messages += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "and once more"},
        ]
    assert cached_tokens[1] > 2 * CHUNK
