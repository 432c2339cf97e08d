"""The command itself: quick help, exit codes, and one line for a mistake."""

import subprocess
import sys

import pytest

import tangram
from tangram import cli
from tangram.errors import BudgetError


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and summary in out for name, summary in cli.COMMANDS.items())


def test_without_a_command_it_prints_the_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: tangram" in capsys.readouterr().out


def test_the_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tangram {tangram.__version__}\n"


def test_an_unknown_command_is_a_usage_error(capsys):
    assert cli.main(["compress"]) == 2
    assert "compress" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert f"usage: tangram {command}" in capsys.readouterr().out


def test_the_help_loads_nothing_heavy():
    code = """
import sys
from tangram import cli
cli.main(["--help"])
heavy = {"torch", "vllm", "transformers", "numpy", "openai", "rich"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_raising(monkeypatch, error):
    from tangram.cli import plan

    def fail(argv):
        raise error

    monkeypatch.setattr(plan, "run", fail)
    return cli.main(["plan"])


def test_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    assert run_raising(monkeypatch, BudgetError("too few [pages]\nfor this")) == 2
    captured = capsys.readouterr()
    assert captured.err == "tangram: too few [pages] for this\n"
    assert captured.out == ""


def test_a_bug_is_not_hidden(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        run_raising(monkeypatch, ZeroDivisionError())


def test_ctrl_c_is_exit_code_130(monkeypatch, capsys):
    assert run_raising(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "tangram: stopped\n"
