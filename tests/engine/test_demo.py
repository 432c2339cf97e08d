"""The demo end to end: two real servers, a few questions, and the figures that it writes."""

import json

import pytest

from tangram import cli
from tangram.conversations import make_conversation
from tests.engine.harness import DEVICE

STOCK_BLOCK_TOKENS = 16 if DEVICE.has_kernels else 128
CONVERSATIONS, TURNS, TOKENS, FACTS, SEED = 2, 2, 600, 4, 5


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_the_demo(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "120")
    target = tmp_path / "demo.json"
    sizes = {
        "--conversations": CONVERSATIONS,
        "--turns": TURNS,
        "--context-tokens": TOKENS,
        "--facts": FACTS,
        "--seed": SEED,
        "--chunk-size": 64,
        "--profile": "none",
        "--json": target,
    }
    code = cli.main(["demo", *(str(part) for pair in sizes.items() for part in pair)])
    out = capfd.readouterr().out
    assert code == 0, out
    assert "KV held at the peak" in out

    result = json.loads(target.read_text())
    stock, compressed = result["servers"]["stock"], result["servers"]["compressed"]
    for figures in (stock, compressed):
        assert figures["not_as_planned"] == []
        assert figures["answers"] == CONVERSATIONS * TURNS
        asked = {
            (number, turn): exchange.answer
            for number in range(CONVERSATIONS)
            for turn, exchange in enumerate(
                make_conversation(SEED + number, TOKENS, FACTS, TURNS).turns
            )
        }
        for reply in figures["replies"]:
            assert reply["expected"] == asked.pop((reply["conversation"], reply["turn"]))
            assert reply["right"] == (reply["answer"].strip() == reply["expected"])
        assert not asked
        assert figures["prefix_cache_hit_tokens"] > 0
        assert figures["peak_samples"] > 0 and figures["peak_kv_blocks"] > 0
        assert 0 < figures["seconds"]

    # All conversations are open at once at the end: every one is whole in the cache.
    token_bytes = stock["kv_block_bytes"] // STOCK_BLOCK_TOKENS
    held = sum(
        make_conversation(SEED + number, TOKENS, FACTS, TURNS).context_tokens
        for number in range(CONVERSATIONS)
    )
    assert stock["peak_kv_bytes"] >= held * token_bytes
    # So short a conversation is mostly raw for one step, while it is read. A GPU's server reads all
    # of them in the same step.
    if not DEVICE.has_kernels:
        assert compressed["peak_kv_bytes"] < 0.75 * stock["peak_kv_bytes"]
    assert stock["layout"] is None
    assert compressed["layout"] == result["compression"]["layout"]
    assert result["versions"]["vllm"] and result["seed"] == SEED
