"""`tangram doctor`: its table and its exit code, with whatever is wrong faked."""

import functools
import threading
from http.server import HTTPServer, SimpleHTTPRequestHandler

import pytest

from tangram import cli
from tangram.cli import doctor
from tangram.vllm_plugin.compat import version
from tangram.vllm_plugin.compat.hook import HookResult
from tangram.vllm_plugin.frontend import hooks

GOOD = HookResult("a good hook", "vllm.place:thing", "what it is for", None)
BROKEN = HookResult("a broken hook", "vllm.place:other", "what it was for", "takes [x], lacks y")


@pytest.fixture(autouse=True)
def sound(monkeypatch):
    """An installation in which nothing is wrong, and no vLLM is looked at."""
    known = {"python": "3.11", "vllm": "0.32.0", "torch": "2", "transformers": "5", "openai": "3"}
    monkeypatch.setattr(doctor, "versions", lambda: known)
    monkeypatch.setattr(doctor, "version_of", lambda *names: "0.32.0")
    monkeypatch.setattr(doctor, "MEDIA_PACKAGES", ())
    monkeypatch.setattr(hooks, "check_hooks", lambda: [GOOD])
    monkeypatch.setattr(version, "describe_platform", lambda: "cuda (A GPU)")
    return known


def row(out: str, name: str) -> str:
    (line,) = [line for line in out.splitlines() if name in line]
    return line


def test_all_is_well(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "ok" in row(out, "a good hook") and "what it is for" in row(out, "a good hook")
    assert "cuda (A GPU)" in row(out, "vLLM serves on")
    assert "tangram.vllm_plugin:register" in row(out, "entry point")
    assert "0.32.0" in row(out, "│ vllm ")
    assert "all is as it should be" in out


def test_a_broken_hook_is_named_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(hooks, "check_hooks", lambda: [GOOD, BROKEN])
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "vllm.place:other: takes [x], lacks y" in row(out, "│ a broken hook")
    assert out.splitlines()[-1] == "compression cannot be served: a broken hook"


def test_without_vllm_there_are_no_hooks_to_check(monkeypatch, sound, capsys):
    monkeypatch.setattr(doctor, "version_of", lambda *names: None)
    monkeypatch.setitem(sound, "vllm", None)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "not installed" in row(out, "│ vllm ") and "tangram-kv[cpu]" in row(out, "│ vllm ")
    assert "a good hook" not in out


def test_a_missing_client_is_no_hindrance_to_serving(monkeypatch, sound, capsys):
    monkeypatch.setitem(sound, "openai", None)
    assert cli.main(["doctor"]) == 0
    assert "not needed to serve" in row(capsys.readouterr().out, "openai")


def test_a_missing_entry_point_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: ())
    assert cli.main(["doctor"]) == 1
    assert "not found" in row(capsys.readouterr().out, "│ plugin's entry point")


def test_a_wheel_whose_own_command_stops_is_a_warning(monkeypatch, capsys):
    version = {("vllm",): None}
    monkeypatch.setattr(doctor, "version_of", lambda *names: version.get(names, "0.32.0"))
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "tangram serve" in row(out, "│ command vllm serve")
    assert out.splitlines()[-1].endswith("to be looked at: command vllm serve")


def test_a_package_that_cannot_be_imported_fails_with_the_remedy(monkeypatch, tmp_path, capsys):
    (tmp_path / "torchbroken.py").write_text("raise RuntimeError('operator nms does not exist')")
    (tmp_path / "torchmute.py").write_text("raise RuntimeError")
    (tmp_path / "torchsound.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(
        doctor, "MEDIA_PACKAGES", names := ("torchbroken", "torchmute", "torchsound", "torchabsent")
    )
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    line = row(out, "│ torchbroken")
    assert "operator nms does not exist" in line
    assert f"pip uninstall {' '.join(names)}" in line
    assert "cannot be imported (RuntimeError: )" in row(out, "│ torchmute")
    assert "│ torchsound" in out and "│ torchabsent" not in out


def test_a_model_that_can_be_compressed(llama, capsys):
    assert cli.main(["doctor", "--model", str(llama)]) == 0
    assert "8 KV and 32 query heads of 128" in row(capsys.readouterr().out, "│ model")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_lora_rank": 512}, "uses MLA"),
        ({"full_attention_interval": 4}, "full_attention_interval 4"),
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, "does not generate text"),
        ({"quantization_config": {"kv_cache_scheme": {"num_bits": 8}}}, "quantised KV cache"),
    ],
)
def test_a_model_that_cannot_be_compressed(write_config, capsys, monkeypatch, changes, reason):
    monkeypatch.setenv("COLUMNS", "800")  # a reason and its remedy are a long line
    assert cli.main(["doctor", "--model", str(write_config(**changes))]) == 1
    assert reason in row(capsys.readouterr().out, "│ model")


SERVED = """\
# TYPE tangram:blocks gauge
tangram:blocks{engine="0",kind="sealed",model_name="m"} 12.0
tangram:blocks{engine="0",kind="recent",model_name="m"} 3.0
tangram:blocks{engine="0",kind="query_ring",model_name="m"} 0.0
tangram:blocks{engine="0",kind="free",model_name="m"} 85.0
tangram:retained_bytes{engine="0",model_name="m"} 3.145728e+06
tangram:saved_bytes{engine="0",model_name="m"} 8.388608e+06
tangram:layout_info{chunk_size="256",engine="0",layout="abc123",level="error",model_name="m",ratio="0.25",scorer="snap_kv"} 1.0
tangram:chunks_sealed_total{engine="0",model_name="m"} 77.0
tangram:chunks_sealed_created{engine="0",model_name="m"} 1.7e+09
tangram:refused_requests_total{model_name="m",reason="max_num_queued_reqs"} 0.0
"""  # noqa: E501
DRIFT = """\
tangram:drift_deviation{engine="0",model_name="m"} OFF
tangram:drift_limit{engine="0",model_name="m"} 1.2
tangram:drift_heads_over_budget{engine="0",model_name="m"} 0.4
tangram:drift_expected_over_budget{engine="0",model_name="m"} 0.1
tangram:drift_sampled_chunks_total{engine="0",model_name="m"} 40.0
"""


def test_a_model_and_a_server_are_not_looked_at_at_once(capsys):
    assert cli.main(["doctor", "--model", "llama", "--url", "http://localhost:8000"]) == 2
    assert "--url: not allowed with argument --model" in capsys.readouterr().err


def only(text: str, name: str) -> doctor.Finding:
    (found,) = [finding for finding in doctor.served(text) if finding.name == name]
    return found


def test_a_servers_metrics_are_told():
    assert (
        "abc123: scorer snap_kv, level error, ratio 0.25" in only(SERVED, "engine 0: layout").found
    )
    assert only(SERVED, "engine 0: blocks").found == "12 sealed, 3 recent, 0 query ring, 85 free"
    assert "3.0 MiB of rows kept, 8.0 MiB" in only(SERVED, "engine 0: running requests").found
    assert only(SERVED, "engine 0: chunks sealed").found == "77"
    assert only(SERVED, "engine 0: drift").found == "not sampled"
    assert all(finding.ok and not finding.warning for finding in doctor.served(SERVED))
    refused = only(SERVED.replace('reqs"} 0.0', 'reqs"} 4.0'), "refused requests")
    assert refused.warning and refused.found == "4 for max_num_queued_reqs"


def test_a_servers_parameters_of_the_scorer_are_told():
    layouts = {
        parameters: only(
            SERVED.replace(
                'scorer="snap_kv"', f'scorer="snap_kv",scorer_parameters="{parameters}"'
            ),
            "engine 0: layout",
        ).found
        for parameters in ("kernel_size=7", "")
    }
    assert "scorer snap_kv(kernel_size=7), level" in layouts["kernel_size=7"]
    assert "scorer snap_kv, level" in layouts[""]


@pytest.mark.parametrize(("off", "is_warning"), [("0.50", False), ("1.21", True)])
def test_drift_beyond_the_limit_is_a_warning_with_a_remedy(off, is_warning):
    finding = only(SERVED + DRIFT.replace("OFF", off), "engine 0: drift")
    assert f"{off} deviations over 40 sampled chunks, limit 1.2; 40% of" in finding.found
    assert finding.ok and finding.warning == is_warning
    assert ("calibrate a --compression-profile" in finding.note) == is_warning


def test_drift_is_not_judged_before_the_server_judges_it():
    text = SERVED + DRIFT.replace("OFF", "9.9")
    few = only(text.replace("} 40.0", "} 15.0"), "engine 0: drift")
    assert few.found == "too few chunks yet (15 of 16)" and not few.warning
    assert only(text.replace("} 40.0", "} 16.0"), "engine 0: drift").warning


@pytest.mark.parametrize(
    ("off", "last"),
    [
        ("0.50", "all is as it should be"),
        ("9.90", "nothing stands in the way; to be looked at: engine 0: drift"),
    ],
)
def test_a_warning_counts_in_the_conclusion(tmp_path, capsys, off, last):
    (tmp_path / "metrics").write_text(SERVED + DRIFT.replace("OFF", off))
    assert cli.main(["doctor", "--url", tmp_path.as_uri()]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_url_without_a_scheme_is_http(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("no_proxy", "localhost")
    (tmp_path / "metrics").write_text(SERVED)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        server.timeout = 20
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        assert cli.main(["doctor", "--url", f"localhost:{server.server_port}"]) == 0
        thread.join()
    assert "abc123" in capsys.readouterr().out


def test_a_server_without_compression_fails(monkeypatch, capsys, tmp_path):
    (tmp_path / "metrics").write_text("vllm:kv_cache_usage_perc 0.5\n")
    assert cli.main(["doctor", "--url", tmp_path.as_uri()]) == 1
    out = capsys.readouterr().out
    assert "--enable-compression" in out and "a good hook" not in out


def test_a_server_that_does_not_answer_is_named(capsys):
    assert cli.main(["doctor", "--url", "http://127.0.0.1:9/"]) == 2
    assert "--url http://127.0.0.1:9/" in capsys.readouterr().err
