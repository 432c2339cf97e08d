"""`tangram doctor`: its table and its exit code, with whatever is wrong faked."""

import functools
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer, SimpleHTTPRequestHandler

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


@pytest.fixture
def serve_page(monkeypatch):
    """Serves a body at /metrics of a loopback address, which it gives, until the test's end."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def serve(body: bytes, reason: str | None = None) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                known = self.path == "/metrics"
                self.send_response(500 if reason else 200 if known else 404, reason)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


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


def test_the_cure_is_said_last_and_alone(monkeypatch, tmp_path, capsys):
    """A row for every hook that failed by the same package stood between it and the reader."""
    (tmp_path / "torchbroken.py").write_text("raise RuntimeError('operator nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "MEDIA_PACKAGES", ("torchbroken",))
    monkeypatch.setattr(hooks, "check_hooks", lambda: [BROKEN] * 50)
    assert cli.main(["doctor"]) == 1
    *_, conclusion, cure = capsys.readouterr().out.splitlines()
    assert conclusion == "compression cannot be served: torchbroken"
    assert cure == "pip uninstall torchbroken: compression needs none of them"


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


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/metrics", "/v1/metrics", "/"])
def test_the_address_of_a_client_is_taken_too(serve_page, capsys, path):
    assert cli.main(["doctor", "--url", serve_page(SERVED.encode()) + path]) == 0
    assert "abc123" in capsys.readouterr().out


def hostile(name: str) -> str:
    """A text that says nothing sound."""
    layout = next(line for line in SERVED.splitlines() if "layout_info" in line)
    return {
        "no layout": SERVED.replace("layout_info", "layout_of"),
        "no scorer": SERVED.replace(',scorer="snap_kv"', ""),
        "no blocks": SERVED.replace("tangram:blocks", "tangram:blogs"),
        "no bytes": SERVED.replace("saved_bytes", "saved"),
        "no sealed": SERVED.replace("chunks_sealed_total", "chunks"),
        "no limit": SERVED + DRIFT.replace("OFF", "1").replace("drift_limit", "drift_lim"),
        "no sampled": SERVED + DRIFT.replace("OFF", "1").replace("sampled_chunks", "chunks"),
        "a label of an engine alone": SERVED.replace('engine="0",kind', 'engine="1",kind'),
        "no value": SERVED + "tangram:blocks{}\n",
        "a word": SERVED.replace("77.0", "many"),
        "open braces": SERVED + "tangram:blocks{" * 3,
        "a page": "<html>\n<h1>502</h1>\n",
        "not a number": SERVED.replace("77.0", "NaN"),
        "no end": SERVED.replace("12.0", "+Inf"),
        "below": SERVED.replace("8.388608e+06", "-1"),
        "drift": SERVED + DRIFT.replace("OFF", "NaN"),
        "refused": SERVED.replace('reqs"} 0.0', 'reqs"} -Inf'),
        "binary": "\x00\x1b\ufffd" * 100 + "\n" + layout,
        "nothing": "",
    }[name]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no layout", "engine 0: layout does not say: layout, scorer"),
        ("no scorer", "engine 0: layout does not say: scorer"),
        ("no blocks", "engine 0: blocks blocks is missing"),
        ("no bytes", "engine 0: running requests saved_bytes is missing"),
        ("no sealed", "engine 0: chunks sealed chunks_sealed_total is missing"),
        ("no limit", "engine 0: drift drift_limit is missing"),
        ("no sampled", "engine 0: drift drift_sampled_chunks_total is missing"),
        ("a label of an engine alone", "engine 0: blocks blocks is missing"),
        ("no value", "no sample tangram:blocks{}"),
        ("a word", "chunks_sealed_total is missing, or no number"),
        ("open braces", "no sample tangram:blocks{tangram"),
        ("a page", "no sample <h1>502</h1>"),
        ("not a number", "engine 0: chunks sealed chunks_sealed_total is missing, or no number"),
        ("no end", "engine 0: blocks sealed is inf"),
        ("below", "engine 0: running requests saved_bytes is -1"),
        ("drift", "engine 0: drift drift_deviation is missing, or no number"),
        ("refused", "refused requests max_num_queued_reqs is -inf"),
        ("binary", "engine 0: blocks blocks is missing"),
        ("nothing", "compression no metrics of it"),
    ],
)
def test_what_a_server_cannot_mean_is_a_row_that_is_wrong(serve_page, capsys, name, said):
    assert cli.main(["doctor", "--url", serve_page(hostile(name).encode())]) == 1
    out, err = capsys.readouterr()
    wrong = [f"{f.name} {f.found}" for f in doctor.served(hostile(name)) if not f.ok]
    assert any(said in finding for finding in wrong), wrong
    assert out.splitlines()[-1].startswith("compression cannot be served: ") and not err
    assert not set(out) & set("\x00\x1b")


def test_nothing_that_a_server_says_is_obeyed(serve_page, capsys):
    evil = "[bold]x[/nothing]\x1b[2J\x07\u202e"
    text = SERVED.replace('engine="0"', f'engine="{evil}"').replace("abc123", evil)
    text = text.replace("sealed", evil, 1).replace('reqs"} 0.0', f'{evil}"}} 3')
    assert cli.main(["doctor", "--url", serve_page(text.encode())]) == 0
    out = capsys.readouterr().out
    assert "engine [bold]x[/nothing]\\x1b[2J\\x07\\u202e: layout" in out
    assert out.count("[bold]x[/nothing]") > 5 and not set(out) & set("\x1b\x07\u202e")


def test_what_a_server_says_without_end_is_cut(serve_page, capsys):
    wide, many = "x" * 100_000, "no sample at all\n" * 1000
    engines = "".join(f'tangram:chunks_sealed_total{{engine="{n}"}} 1\n' for n in range(1000))
    text = SERVED.replace("abc123", wide) + engines + many
    assert cli.main(["doctor", "--url", serve_page(text.encode())]) == 1
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 200 and max(map(len, out.splitlines())) < 1000
    found = doctor.served(SERVED + many)
    assert [f.found for f in found[-6:]] == ["no sample at all"] * 5 + ["1000 lines in all"]
    assert "that are not shown" in doctor.served(text)[-1].found and len(doctor.served(text)) == 61


def test_a_reason_without_end_is_cut(serve_page, capsys):
    assert cli.main(["doctor", "--url", serve_page(b"", reason="\x1b[31m" + "no" * 10_000)]) == 2
    err = capsys.readouterr().err
    assert "HTTP Error 500" in err and len(err) < 1000 and "\x1b" not in err


def test_a_server_that_does_not_answer_is_named(capsys):
    assert cli.main(["doctor", "--url", "http://127.0.0.1:9/"]) == 2
    assert "--url http://127.0.0.1:9/" in capsys.readouterr().err
