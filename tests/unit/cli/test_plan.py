"""`tangram plan`: its numbers by hand, its JSON, and the models that it refuses."""

import json
import shutil

import pytest

from tangram import cli
from tangram.bundled import recall_model_path
from tangram.geometry import Geometry, HeadGroups
from tangram.plan.cached import cached_profile
from tangram.plan.capacity import head_skew, most_blocks
from tangram.plan.dtypes import served_dtype
from tangram.plan.options import CompressionOptions
from tangram.profile import ModelIdentity

MIB = 1 << 20


def plan(*arguments, model) -> int:
    return cli.main(["plan", str(model), *arguments])


def plan_json(model, tmp_path, *arguments):
    target = tmp_path / "plan.json"
    assert plan("--gpu-memory", "16", "--json", str(target), *arguments, model=model) == 0
    return json.loads(target.read_text())


def test_the_numbers_of_an_8b_model(llama, tmp_path):
    result = plan_json(
        llama, tmp_path, "--compression-ratio", "0.25", "--contexts", "1000,4096,131072"
    )
    # 32 layers x 8 heads x 2 x 128 elements x 2 bytes.
    token = 128 << 10
    assert result["full"] == {
        "bytes_per_token": token,
        "block_tokens": 16,
        "block_bytes": 16 * token,
        # 16 GiB hold 8,192 blocks, and one is vLLM's null block.
        "blocks": 8191,
    }
    # A head keeps 64 of 256 rows, so a sealed chunk takes what 64 raw tokens take.
    assert result["compressed"] == {
        "bytes_per_token": token / 4,
        "block_bytes": 8 * MIB,
        "sealed_block_bytes": 8 * MIB,
        "sealed_block_tokens": 256,
        "recent_block_bytes": 8 * MIB,
        "recent_block_tokens": 64,
        "query_ring_blocks": 0,
        "blocks": 2047,
    }
    assert result["budget_rows"] == {"min": 64, "median": 64, "max": 64, "mean": 64}
    by_context = {row["context_tokens"]: row for row in result["requests"]}
    # 3 sealed chunks; raw tokens 736 to 999, in blocks 11 to 15: 8 blocks of 8 MiB.
    assert by_context[1000] == {
        "context_tokens": 1000,
        "full_bytes": 63 * 2 * MIB,
        "compressed_bytes": 8 * 8 * MIB,
        "full_requests": 8191 // 63,
        "compressed_requests": 2047 // 8,
        "gain": 63 * 2 / (8 * 8),
    }
    # While token 4,095 is computed: 16 sealed chunks, and tokens 3,808 to 4,095 in blocks 59 to 63.
    assert by_context[4096]["compressed_bytes"] == 21 * 8 * MIB
    assert by_context[4096]["compressed_requests"] == 2047 // 21
    assert by_context[4096]["full_requests"] == 8191 // 256
    assert by_context[131072]["compressed_bytes"] == (512 + 5) * 8 * MIB
    assert by_context[131072]["gain"] == pytest.approx(8192 * 2 / (517 * 8))


def test_a_ring_of_queries_is_counted(llama, tmp_path):
    arguments = ("--compression-ratio", "0.25", "--contexts", "1000")
    result = plan_json(llama, tmp_path, *arguments, "--compression-scorer", "snap_kv")
    # 32 queries of 32 layers x 32 heads x 128 elements x 2 bytes are 8 MiB.
    assert result["compressed"]["query_ring_blocks"] == 1
    assert result["requests"][0]["compressed_bytes"] == 9 * 8 * MIB


def test_parameters_of_the_scorer_are_shown(llama, tmp_path, capsys):
    snap_kv = ("--compression-scorer", "snap_kv")
    seven = ("--compression-scorer-parameters", '{"kernel_size": 7}')
    result = plan_json(llama, tmp_path, *snap_kv, *seven)
    assert (result["scorer"], result["scorer_parameters"]) == ("snap_kv", {"kernel_size": 7})
    assert "scorer snap_kv(kernel_size=7), 4 heads a page" in capsys.readouterr().out
    plain = plan_json(llama, tmp_path, *snap_kv)
    assert plain["layout"] == result["layout"] and plain["scorer_parameters"] == {}
    assert "scorer snap_kv, 4 heads a page" in capsys.readouterr().out


def test_the_flags_and_the_dtype_reach_the_plan(llama, tmp_path):
    result = plan_json(
        llama,
        tmp_path,
        *("--compression-chunk-size", "512", "--compression-window-size", "64"),
        *("--page-group-size", "2", "--dtype", "float32"),
    )
    assert result["ratio"] == 0.3
    assert result["full"]["bytes_per_token"] == 256 << 10
    assert result["compressed"]["sealed_block_tokens"] == 512
    assert (result["window_size_tokens"], result["page_group_size"]) == (64, 2)
    assert [row["context_tokens"] for row in result["requests"]] == [4096, 16384, 32768, 131072]
    assert result["versions"]["tangram"] and result["identity"]["num_kv_heads"] == 8


def test_the_profile_that_a_server_would_take_by_itself(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TANGRAM_CACHE_DIR", str(tmp_path / "cache"))
    model = recall_model_path()
    flags = ("--compression-scorer", "key_diff", "--page-group-size", "1")
    before = plan_json(model, tmp_path, *flags)
    assert (before["level"], before["profile"]) == ("uniform", None)
    said = " ".join(capsys.readouterr().out.split())
    assert "no profile of it is cached yet: a server would calibrate one first" in said

    given = {"compression_scorer": "key_diff", "page_group_size": 1}
    identity = ModelIdentity.from_config(json.loads((model / "config.json").read_text()))
    cached = cached_profile(CompressionOptions.from_mapping(given), str(model), identity)
    cached.parent.mkdir(parents=True)
    shutil.copy(model / "key_diff.profile", cached)
    after = plan_json(model, tmp_path, *flags)
    assert (after["level"], after["profile"]) == ("measured", str(cached))
    assert after["compressed"]["block_bytes"] == before["compressed"]["block_bytes"]
    assert "calibrate" not in capsys.readouterr().out
    cached.write_bytes(b"")
    assert plan_json(model, tmp_path, *flags)["level"] == "uniform", "an empty file is none"
    assert "no readable profile" in " ".join(capsys.readouterr().out.split())

    none, uniform = ("--compression-profile", "none"), ("--compression-level", "uniform")
    for nothing in (none, uniform, ("--compression-profile", "auto", *uniform)):
        assert plan_json(model, tmp_path, *flags, *nothing)["profile"] is None
        assert "calibrate" not in capsys.readouterr().out


def test_the_bundled_model_is_planned_as_it_is_served(tmp_path, monkeypatch, capsys):
    """Its name was asked of the Hub, and the plan was of uniform budgets in groups of 4 heads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TANGRAM_CACHE_DIR", str(tmp_path / "cache"))
    result = plan_json("recall", tmp_path)
    profile = recall_model_path() / "key_diff.profile"
    assert (result["level"], result["profile"]) == ("measured", str(profile))
    assert result["page_group_size"] == 1
    assert "calibrate" not in capsys.readouterr().out

    grouped = plan_json("recall", tmp_path, "--page-group-size", "2")
    assert (grouped["page_group_size"], grouped["profile"]) == (2, str(profile))
    auto = plan_json("recall", tmp_path, "--compression-scorer", "auto")
    plain = plan_json("recall", tmp_path)
    assert auto["scorer"] == "key_diff" and auto["layout"] == plain["layout"]
    other = plan_json("recall", tmp_path, "--compression-scorer", "tova")
    assert (other["scorer"], other["profile"], other["page_group_size"]) == ("tova", None, 1)
    assert "no profile of it is cached yet" in " ".join(capsys.readouterr().out.split())


def test_a_path_goes_before_the_bundled_models_name(llama, monkeypatch, tmp_path):
    llama.rename(tmp_path / "recall")
    monkeypatch.chdir(tmp_path)
    assert plan_json("recall", tmp_path)["page_group_size"] == 4


def test_the_config_is_never_written_over(llama, capsys):
    config = llama / "config.json"
    before = config.read_text()
    assert plan("--gpu-memory", "16", "--json", str(config), model=config) == 2
    assert f"--json {config} cannot be written" in " ".join(capsys.readouterr().err.split())
    assert config.read_text() == before


def test_arguments_of_calibration_that_no_shell_could_read(llama, monkeypatch, capsys):
    (llama / "model.safetensors").write_bytes(bytes(16))
    monkeypatch.setenv("TANGRAM_CALIBRATE_ARGS", "--data 'chats.jsonl")
    assert plan("--gpu-memory", "16", model=llama) == 2
    assert "TANGRAM_CALIBRATE_ARGS" in capsys.readouterr().err


def test_weights_that_are_not_here_are_told(llama, tmp_path, capsys):
    assert plan_json(llama, tmp_path)["level"] == "uniform"
    said = " ".join(capsys.readouterr().out.split())
    assert "its weights are not here (there are no weights" in said


def test_how_far_heads_are_from_alike(llama, tmp_path, capsys):
    skew = plan_json(llama, tmp_path, "--compression-ratio", "0.25")["head_skew"]
    assert skew == {"mean": 1, "worst": 1}, "uniform budgets"
    assert "programs read equal parts" in capsys.readouterr().out


def test_the_largest_head_over_the_mean_of_its_layer():
    heads = [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2
    groups = HeadGroups.from_lists(heads, [[6, 2], [4, 4]])
    assert head_skew(Geometry(groups, 32, 128, 2, 256, 32, 4)) == {"mean": 1.25, "worst": 1.5}


def test_a_file_of_a_config_is_as_good_as_its_folder(llama, tmp_path):
    from_folder = plan_json(llama, tmp_path)
    from_file = plan_json(llama / "config.json", tmp_path)
    assert from_folder.pop("model") != from_file.pop("model")
    assert from_folder == from_file


def test_the_table_names_what_fits(llama, capsys):
    contexts = ("--contexts", "4096")
    assert plan("--gpu-memory", "16", "--compression-ratio", "0.25", *contexts, model=llama) == 0
    out = capsys.readouterr().out
    assert "131,072 full, 32,768 sealed" in out
    (row,) = (line for line in out.splitlines() if " 4,096 " in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "4,096",
        "31",
        "97",
        "512.0",
        "168.0",
        "3.05x",
    ]


def test_the_most_blocks_are_held_before_a_boundary_not_at_it():
    from tangram.geometry import Geometry, HeadGroups

    groups = HeadGroups.from_lists([[[0]]], [[1]])
    layout = Geometry(groups, 1, 16, 2, 64, 16, 0)
    assert layout.recent_block_tokens == 16
    held = [layout.blocks_held(n, n - 1).total for n in range(1, 257)]
    assert [most_blocks(layout, n) for n in range(1, 257)] == [
        max(held[max(0, n - 64) : n]) for n in range(1, 257)
    ]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32"}, "bfloat16"),
        ({}, "bfloat16"),
        ({"text_config": {"torch_dtype": "float16"}}, "float16"),
    ],
)
def test_the_dtype_that_vllm_would_take(config, expected):
    assert served_dtype(config) == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 4096}, "sliding-window"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding-window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["linear_attention"] * 32}, "linear_attention"),
        ({"kv_lora_rank": 512}, "MLA"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"attention_chunk_size": 8192}, "local attention"),
        ({"num_kv_shared_layers": 2}, "shares KV"),
        ({"mamba_d_state": 16}, "other than attention"),
        ({"full_attention_interval": 4}, "other than attention over all tokens (full_attention_in"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "does not generate text"),
        (
            {"quantization_config": {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}},
            "quantised KV cache (kv_cache_scheme of quantization_config): give --dtype and",
        ),
    ],
)
def test_models_that_cannot_be_compressed_are_refused(write_config, capsys, changes, reason):
    model = write_config(**changes)
    assert plan("--gpu-memory", "16", model=model) == 2
    assert reason in capsys.readouterr().err


def test_a_cache_that_does_without_the_checkpoints_scales_is_planned(write_config):
    model = write_config(quantization_config={"kv_cache_scheme": {"num_bits": 8}})
    assert plan("--gpu-memory", "16", "--dtype", "bfloat16", model=model) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": None, "layer_types": ["full_attention"] * 32},
    ],
)
def test_a_window_that_is_not_used_is_no_hindrance(write_config, changes):
    assert plan("--gpu-memory", "16", model=write_config(**changes)) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "16", "--compression-ratio", "1.5"], "--compression-ratio"),
        (["--gpu-memory", "16", "--page-group-size", "3"], "--page-group-size"),
        (["--gpu-memory", "16", "--compression-scorer", "none"], "--compression-scorer"),
        (["--gpu-memory", "16", "--compression-scorer-parameters", "[7]"], "a JSON object"),
        (["--gpu-memory", "16", "--compression-level", "mass"], "--compression-profile"),
        (["--gpu-memory", "0.001"], "--gpu-memory"),
        (["--gpu-memory", "0"], "--gpu-memory"),
        (["--gpu-memory", "16", "--contexts", "0"], "--contexts"),
        (["--gpu-memory", "16", "--contexts", "a"], "--contexts: a: expected lengths"),
        (["--gpu-memory", "much"], "--gpu-memory: much: expected a number above 0"),
        (["--gpu-memory", "16", "--compression-profile", ""], "--compression-profile is empty"),
        (["--gpu-memory", "16", "--json", "/none/plan.json"], "--json /none/plan.json cannot"),
        ([], "--gpu-memory"),
    ],
)
def test_a_mistake_names_its_option(llama, capsys, arguments, said):
    assert plan(*arguments, model=llama) == 2
    captured = capsys.readouterr()
    assert said in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments",
    [["--gpu-memory", "16", "--contexts", "128X"], [], ["--no-such-option"], ["--dtype", "int3"]],
)
def test_a_mistake_is_one_line_with_the_remedy(llama, capsys, arguments):
    assert plan(*arguments, model=llama) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("tangram: ") and len(captured.err.splitlines()) == 1
    assert "usage:" not in captured.err and "tangram plan --help" in captured.err
    assert captured.out == ""


def test_lengths_may_be_in_thousands(llama, tmp_path):
    result = plan_json(llama, tmp_path, "--contexts", "1000,4K,128k,1M")
    contexts = [row["context_tokens"] for row in result["requests"]]
    assert contexts == [1000, 4096, 131072, 1 << 20]


def test_brackets_and_control_characters_of_a_model_are_shown(
    write_config, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    odd = write_config(architectures=["[bold]x[/nothing]\x1b[2J"]).rename("[red] model")
    assert plan("--gpu-memory", "16", model=odd) == 0
    out = capsys.readouterr().out
    assert "[red] model ([bold]x[/nothing]\\x1b[2J, bfloat16)" in out and "\x1b" not in out


@pytest.mark.parametrize("name", ["./nothing", "/nothing/here", "a/b/c", "config.json.json"])
def test_a_path_without_a_config_is_not_looked_up_on_the_hub(name, capsys):
    assert plan("--gpu-memory", "1", model=name) == 2
    assert "neither a folder" in capsys.readouterr().err


def test_a_config_that_is_no_json_object(tmp_path, capsys):
    (tmp_path / "config.json").write_text("[]")
    assert plan("--gpu-memory", "1", model=tmp_path) == 2
    assert "expected a JSON object" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert plan("--gpu-memory", "1", model=tmp_path) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err


def test_a_name_that_the_hub_does_not_give_is_told(monkeypatch, capsys):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def offline(*arguments, **options):
        raise OSError("no network\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    assert plan("--gpu-memory", "1", model="no-such-org/no-such-model") == 2
    error = capsys.readouterr().err
    assert "no-such-org/no-such-model" in error and "OSError: no network)" in error


def test_a_name_is_read_from_the_hubs_cache(monkeypatch, llama, tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    cached = str(llama / "config.json")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **options: cached)
    assert plan_json("org/cached", tmp_path)["full"]["bytes_per_token"] == 128 << 10
