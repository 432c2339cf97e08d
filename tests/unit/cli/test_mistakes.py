"""Everyday mistakes of `tangram serve`, answered before vLLM is loaded."""

import os
import socket
import subprocess
import sys

import pytest

from tangram import cli
from tangram.cli import mistakes, serve
from tangram.cli.mistakes import check_arguments, vllm_flags
from tangram.errors import ConfigurationError
from tangram.plan.options import flag_names
from tangram.vllm_plugin.compat.hook import find_moved


@pytest.fixture(autouse=True)
def free_port(monkeypatch):
    """The default port may be taken here."""
    monkeypatch.setattr(mistakes, "_PORT", 0)


def check(*arguments):
    check_arguments(serve._spelled(arguments), serve._flags(arguments))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--compresion-ratio", "--compression-ratio"),
        ("--compression_raito=0.3", "--compression-ratio"),
        ("--compression-rat", "--compression-ratio"),  # ours are taken whole
        ("--page-group-sizes", "--page-group-size"),
        ("--max-modle-len", "--max-model-len"),
        ("--tensor-paralel-size=1", "--tensor-parallel-size"),
        ("--gpu-memory-utilisation", "--gpu-memory-utilization"),
        ("--api-server-cuont", "--api-server-count"),
        ("--enable-prefix-cacheing", "--enable-prefix-caching"),
    ],
)
def test_a_misspelled_option_is_told_with_what_was_meant(given, meant):
    name = given.split("=")[0].split(".")[0].replace("_", "-")
    with pytest.raises(ConfigurationError) as raised:
        check("org/model", given, "0.3")
    said = f"tangram serve knows no option {name}: did you mean {meant}?"
    assert str(raised.value).startswith(said)


@pytest.mark.parametrize(
    "given",
    [
        ["--compression-ratio", "0.3", "--page_group_size=2"],
        ["--max-model-len", "99", "--tensor-parallel", "1", "--no-enable-prefix-caching"],
        ["--compilation-config.mode=none", "--limit-mm-per-prompt.image+", "3", "-cc.mode=none"],
        ["--made-up-option=3", "--port", "0"],
    ],
)
def test_what_vllm_may_know_is_left_to_it(given):
    check("org/model", *given)


def test_no_option_of_vllm_is_taken_for_a_mistake():
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    places = (f"vllm.entrypoints.{where}.cli_args" for where in ("common", "launchers"))
    make_arg_parser = find_moved(*(f"{place}:make_arg_parser" for place in places))
    parser = make_arg_parser(FlexibleArgumentParser())
    options = [o for o in parser._option_string_actions if o.startswith("--")]
    assert len(options) > 200
    mistakes._check_flags(options)
    known = vllm_flags() | {"--help"} | flag_names()
    assert [option for option in options if option not in known] == []


def test_without_vllms_source_only_our_own_options_are_judged(monkeypatch):
    monkeypatch.setattr(mistakes, "find_spec", lambda name: None)
    assert vllm_flags() == set()
    check("org/model", "--max-modle-len", "9")
    with pytest.raises(ConfigurationError, match="--compression-level"):
        check("org/model", "--compression-levle", "mass")


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "../nowhere", "models/no/where"])
def test_a_folder_that_is_not_there_is_told(tmp_path, monkeypatch, model):
    monkeypatch.chdir(tmp_path)
    for given in ([model], ["--model", model], [f"--model={model}"]):
        with pytest.raises(ConfigurationError, match=f"MODEL is {model}, and there is no such"):
            check(*given)


def test_a_home_that_the_shell_did_not_expand_is_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="~ is not expanded there"):
        check("--model=~/models/nowhere")


def test_models_that_need_not_be_folders_are_left_to_vllm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a/b/c").mkdir(parents=True)
    for model in ("org/name", "name", "s3://bucket/a/b", "a/b/c", "./a", str(tmp_path)):
        check(model)
    check("--dtype", "float32")


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", [[], ["--host", "127.0.0.1"], ["--host=localhost"]])
def test_a_port_that_is_taken_is_told(taken, monkeypatch, host):
    with pytest.raises(ConfigurationError, match=f"--port {taken} is taken.*another --port"):
        check("org/model", "--port", str(taken), *host)
    monkeypatch.setattr(mistakes, "_PORT", taken)
    with pytest.raises(ConfigurationError, match=f"--port {taken} is taken"):
        check("org/model", *host)


@pytest.mark.parametrize(
    "elsewhere",
    [
        ["--uds", "/tmp/s"],
        ["--headless"],
        ["--grpc"],
        ["--config", "c.yaml"],
        ["--data_parallel_multi_port_external_lb"],
        ["--port", "0"],
        ["--host", "no such host"],
        ["--port", "70000"],
    ],
)
def test_a_port_that_is_not_bound_as_given_is_not_tried(taken, elsewhere):
    check("org/model", "--port", str(taken), *elsewhere)


def test_a_port_that_was_just_left_is_free(taken):
    with socket.create_connection(("127.0.0.1", taken)):
        pass
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), server.accept()[0] as accepted:
            accepted.shutdown(socket.SHUT_RDWR)
    check("org/model", "--port", str(port))


def test_a_mistake_costs_no_import_of_vllm_and_one_line():
    script = (
        "import sys; from tangram import cli; code = cli.main(sys.argv[1:]); "
        "sys.exit(99 if 'vllm' in sys.modules else code)"
    )
    for arguments in (["org/m", "--compresion-ratio", "0.3"], ["./nowhere"], ["--port", "x"]):
        command = [sys.executable, "-c", script, "serve", *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("tangram: ")


def test_help_is_vllms_to_give(monkeypatch, taken):
    became = []
    monkeypatch.setattr(os, "execve", lambda *arguments: became.append(arguments))
    with pytest.raises(AssertionError, match="unreachable"):
        cli.main(["serve", "--help=all", "--port", str(taken)])
    assert len(became) == 1
