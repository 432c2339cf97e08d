"""The demo without servers: what it plans, what it makes of figures, and when it fails."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tangram import cli
from tangram.cli import demo
from tangram.cli.demo_report import server_figures
from tangram.serving.played import Reply
from tangram.serving.scrape import CacheMetrics
from tangram.serving.server import ServerError

MIB = 1 << 20
REPLIES = [
    Reply(0, 0, "1234", "1234", True, 500, 2.0),
    Reply(0, 1, "5678", "0000", False, 520, 0.5),
]


def prepared(*arguments):
    return demo.prepare(demo.parser().parse_args(["--profile", "none", *arguments]))


def metrics(num_blocks, block_tokens, query_tokens=0, hit_tokens=0):
    return CacheMetrics(0.0, num_blocks, block_tokens, query_tokens, hit_tokens, 0)


def figures(made, *, compressed, log="", before=None, after=None, **changes):
    layout = made.plan.geometry
    block_bytes = layout.block_bytes if compressed else 128 * layout.token_bytes
    tokens = layout.recent_block_tokens if compressed else 128
    blocks = made.kv_cache_memory_bytes // block_bytes
    settings = {
        "before": before or metrics(blocks, tokens),
        "after": after or metrics(blocks, tokens, 1000, 250),
        "peak_blocks": 10,
        "num_samples": 3,
        "seconds": 1.5,
        "memory_bytes": made.kv_cache_memory_bytes,
    }
    server = SimpleNamespace(command=["vllm", "serve"], log_text=lambda: log)
    return server_figures(
        made.plan, server, REPLIES, compressed=compressed, **{**settings, **changes}
    )


def log_of(made):
    return f"INFO KV cache compression: ratio 0.25, layout {made.plan.geometry.digest}\n"


def test_both_servers_are_given_the_same_memory_and_room_for_all():
    made = prepared("--conversations", "3", "--context-tokens", "500", "--facts", "5")
    arguments = list(made.server_arguments)
    memory = int(arguments[arguments.index("--kv-cache-memory-bytes") + 1])
    longest = int(arguments[arguments.index("--max-model-len") + 1])
    assert memory == made.kv_cache_memory_bytes
    assert memory >= made.plan.geometry.full_bytes(3 * longest)
    assert longest >= 500 + demo.HOLD_TOKENS
    assert len(made.conversations) == 3
    assert len({c.turns[0].user for c in made.conversations}) == 3
    assert all(490 <= c.context_tokens <= 500 for c in made.conversations)


def test_the_same_seed_gives_the_same_conversations():
    small = ("--conversations", "2", "--context-tokens", "500", "--facts", "5")
    assert prepared(*small).conversations == prepared(*small).conversations
    assert prepared(*small).conversations != prepared(*small, "--seed", "9").conversations


def test_the_flags_of_compression_reach_the_server():
    made = prepared(
        "--ratio", "0.5", "--chunk-size", "128", "--scorer", "tova", "--page-group-size", "2"
    )
    arguments = demo.compression_arguments(made.options)
    assert arguments[0] == "--enable-compression"
    pairs = dict(zip(arguments[1::2], arguments[2::2], strict=True))
    assert pairs["--compression-ratio"] == "0.5"
    assert pairs["--compression-chunk-size"] == "128"
    assert pairs["--compression-scorer"] == "tova"
    assert pairs["--page-group-size"] == "2"
    assert pairs["--compression-profile"] == "none"
    assert made.plan.geometry.chunk_size_tokens == 128


def test_auto_is_the_scorer_of_the_bundled_profile():
    made, same = (
        demo.prepare(demo.parser().parse_args(given)) for given in ([], ["--scorer", "auto"])
    )
    assert made.plan == same.plan and made.plan.scorer_name == "key_diff"
    assert made.plan.profile_path and made.plan.level == "measured"


def test_a_server_of_the_demo_never_calibrates(monkeypatch, tmp_path, capsys):
    """Another scorer than the bundled profile's was served with uniform budgets, unasked."""
    monkeypatch.setenv("TANGRAM_CACHE_DIR", str(tmp_path))
    assert cli.main(["demo", "--scorer", "tova"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    for words in ("--profile is not given", "scorer tova", "tangram calibrate", "--profile none"):
        assert words in said
    for arguments in (["--scorer", "tova", "--level", "uniform"], ["--profile", "none"], []):
        made = demo.prepare(demo.parser().parse_args(arguments))
        given = demo.compression_arguments(made.options)
        profile = given[given.index("--compression-profile") + 1]
        assert profile == (made.plan.profile_path or "none")


def test_the_bundled_profile_is_used_unless_another_way_is_asked_for(monkeypatch):
    monkeypatch.setattr(demo, "bundled_profile_options", lambda: {"compression_level": "error"})
    parse = demo.parser().parse_args
    assert demo._options(parse([])).compression_level == "error"
    assert demo._options(parse(["--scorer", "tova"])).compression_level is None
    assert demo._options(parse(["--profile", "none"])).compression_level is None
    monkeypatch.setattr(demo, "bundled_profile_options", lambda: {"compression_profile": "p"})
    assert demo._options(parse(["--level", "mass"])).compression_profile == "p"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--context-tokens", "40000"], "--context-tokens"),
        (["--context-tokens", "50"], "context_tokens"),
        (["--turns", "9", "--facts", "4"], "turns"),
        (["--ratio", "0"], "--compression-ratio"),
        (["--conversations", "0"], "--conversations"),
        (["--kv-memory", "1"], "--kv-memory is 1"),
        (["--kv-memory", "1", "--skip-stock"], "--kv-memory is 1"),
        (["--json", "/none/demo.json"], "--json /none/demo.json cannot be written"),
    ],
)
def test_a_mistake_is_told_before_any_server_starts(arguments, said, capsys):
    assert cli.main(["demo", "--profile", "none", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_the_figures_of_a_server():
    made = prepared()
    stock = figures(made, compressed=False)
    # Blocks of 128 tokens of 6 layers x 4 heads x 2 x 64 elements.
    assert stock["kv_block_bytes"] == 128 * made.plan.geometry.token_bytes
    assert stock["peak_kv_bytes"] == 10 * stock["kv_block_bytes"]
    assert (stock["answers_right"], stock["answers"]) == (1, 2)
    assert stock["prefix_cache_hit_rate"] == 0.25
    assert (stock["seconds_first_answer"], stock["seconds_later_answer"]) == (2.0, 0.5)
    assert stock["layout"] is None and stock["not_as_planned"] == []
    compressed = figures(made, compressed=True, log=log_of(made))
    assert compressed["peak_kv_bytes"] == 10 * made.plan.geometry.block_bytes
    assert compressed["layout"] == made.plan.geometry.digest
    assert compressed["not_as_planned"] == []


def test_compression_that_is_not_active_is_found_out():
    made = prepared()
    planned = figures(made, compressed=True, log=log_of(made))["kv_blocks"]
    tokens = made.plan.geometry.recent_block_tokens

    def reasons(**changes):
        return " ".join(
            figures(made, compressed=True, **{"log": log_of(made), **changes})["not_as_planned"]
        )

    assert "names layout None" in reasons(log="")
    assert "names layout 123abc" in reasons(log="KV cache compression: x layout 123abc")
    assert "blocks" in reasons(after=metrics(planned // 2, tokens, 1, 1))
    assert "tokens" in reasons(after=metrics(planned, 2 * tokens, 1, 1))
    stock = figures(made, compressed=False, log=log_of(made))
    assert "planned None" in stock["not_as_planned"][0]


def test_stock_blocks_that_a_device_pads_are_counted_as_they_are():
    made = prepared()
    padded = figures(made, compressed=False, after=metrics(299, 128, 1, 1))
    assert padded["kv_block_bytes"] == made.kv_cache_memory_bytes // 299
    assert padded["not_as_planned"] == []


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """The demo with servers that only give figures."""
    state = {"log": True}

    def play_against(name, made, logs, console):
        state["logs"] = logs
        log = log_of(made) if state["log"] and name == demo.COMPRESSED else ""
        if state.get("error"):
            raise ServerError(state["error"])
        return {**figures(made, compressed=name == demo.COMPRESSED, log=log)}

    monkeypatch.setattr(demo, "_play_against", play_against)
    monkeypatch.setattr(demo.tempfile, "tempdir", str(tmp_path))
    state["json"] = tmp_path / "demo.json"
    return state


def test_the_table_and_the_file(faked, capsys):
    command = ["demo", "--profile", "none", "--json", str(faked["json"])]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "KV held at the peak" in line]
    cells = [cell.strip() for cell in line.split("│")]
    made = prepared()
    ratio = 128 * made.plan.geometry.token_bytes / made.plan.geometry.block_bytes
    assert cells[4] == f"{ratio:.2f}x"
    result = json.loads(faked["json"].read_text())
    assert result["command"] == ["tangram", *command]
    assert result["seed"] == 1 and result["versions"]["tangram"]
    assert set(result["servers"]) == {"stock", "compressed"}
    assert result["compression"]["layout"] == made.plan.geometry.digest
    assert result["servers"]["stock"]["replies"][1]["answer"] == "0000"
    assert not faked["logs"].exists()


def test_without_stock_there_is_nothing_to_compare_with(faked, capsys):
    assert cli.main(["demo", "--profile", "none", "--skip-stock"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2" in out and "stock" not in out


def test_it_fails_when_compression_was_not_active(faked, capsys):
    faked["log"] = False
    assert cli.main(["demo", "--profile", "none"]) == 1
    assert "compression was not active" in capsys.readouterr().out
    assert faked["logs"].exists()


def test_it_fails_when_stock_was_compressed(faked, monkeypatch, capsys):
    play_against = demo._play_against

    def compressed_stock(name, made, logs, console):
        return {**play_against(name, made, logs, console), "not_as_planned": ["layout 123"]}

    monkeypatch.setattr(demo, "_play_against", compressed_stock)
    assert cli.main(["demo", "--profile", "none"]) == 1
    assert "stock was not stock: layout 123" in capsys.readouterr().out


def test_it_fails_when_a_server_does_not_come_up(faked, capsys):
    faked["error"] = "stock vLLM ended with code 1; the end of [its] log"
    assert cli.main(["demo", "--profile", "none"]) == 1
    assert "the end of [its] log" in capsys.readouterr().out


def test_a_plan_of_another_ratio_has_another_layout():
    made = prepared()
    other = prepared("--ratio", "0.5")
    assert replace(made, plan=other.plan).plan.geometry.digest != made.plan.geometry.digest
