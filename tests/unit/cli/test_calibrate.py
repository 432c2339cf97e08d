"""`tangram calibrate` before an engine starts: what it reads, and what it refuses."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from tangram import cli
from tangram.cli.calibrate import parser
from tangram.cli.calibration import prepare
from tangram.errors import ConfigurationError


def prepared(tmp_path, *arguments, model="recall"):
    out = ("--out", str(tmp_path / "p.profile"))
    return prepare(parser().parse_args([model, *out, *arguments]))


def test_the_recall_model_reads_conversations_of_its_own(tmp_path):
    plan = prepared(tmp_path, "--samples", "10", "--max-tokens", "800")
    assert {sample.kind for sample in plan.samples + plan.held} == {"recall"}
    assert (len(plan.samples), len(plan.held)) == (7, 3)
    assert plan.options.page_group_size == 1 and plan.ratios == (0.5, 0.25, 0.1)
    lengths = [len(sample.token_ids) for sample in plan.samples + plan.held]
    assert 480 <= min(lengths) and 700 < max(lengths) <= 800
    again = prepared(tmp_path, "--samples", "10", "--max-tokens", "800")
    assert plan == again
    other = prepared(tmp_path, "--samples", "10", "--max-tokens", "800", "--seed", "1")
    assert not {s.token_ids for s in plan.samples} & {s.token_ids for s in other.samples}


def test_texts_of_the_users_own(tmp_path):
    path = tmp_path / "chats.jsonl"
    turns = [
        {"role": "user", "content": "the code of harbor is 4821. " * 40 + "harbor?"},
        {"role": "assistant", "content": "4821"},
    ] * 2
    rows = [{"messages": turns}, {"messages": turns[:1]}, {"text": "too short"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    plan = prepared(tmp_path, "--data", str(path), "--no-measure")
    assert sorted(len(sample.later) for sample in plan.samples) == [0, 3]
    assert plan.held == () and plan.ratios == ()
    assert plan.description == f"{path}, seed 0"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--max-tokens", "256"], ["--max-tokens is 256", "more than a chunk of 256"]),
        (["--max-tokens", "40000"], ["--max-tokens is 40000", "32768"]),
        (["--samples", "3"], ["--samples 4", "--no-measure"]),
        (["--compression-chunk-size", "100"], ["--compression-chunk-size"]),
        (["--page-group-size", "3"], ["--page-group-size is 3"]),
        (["--page-group-size", "0"], ["--page-group-size is 0"]),
        (["--scorer", "h2o"], ["h2o", "key_diff"]),
        (["--scorer", "tova", "--compression-window-size", "0"], ["--compression-window-size"]),
        (["--measure-ratios", "0.05"], ["--compression-ratio 0.05", "0.0625"]),
        (["--engine-args", "{"], ["--engine-args", "JSON"]),
        (["--engine-args", "[]"], ["--engine-args", "object"]),
        (["--engine-args", '{"max_model_len": 9}'], ["--engine-args", "max_model_len"]),
        (["--data", "chats.csv"], ["chats.csv", ".jsonl"]),
        (["--data", "/nowhere/chats.jsonl"], ["/nowhere/chats.jsonl"]),
        (["--out", "/nowhere/p.profile"], ["--out", "/nowhere"]),
        (["--out", "."], ["--out .", "a folder"]),
        (["--measure-time-limit", "nan"], ["--measure-time-limit", "above 0"]),
        (["--engine-args", '{"fast": true}'], ["--engine-args", "no argument fast"]),
        (["--engine-args", '{"seed": "x"}'], ["--engine-args", "seed is 'x'", "integer"]),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, words):
    out = ["--out", str(tmp_path / "p.profile")]
    assert cli.main(["calibrate", "recall", *out, *arguments]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said


def test_texts_that_are_all_too_short_are_refused(tmp_path):
    path = tmp_path / "chats.txt"
    path.write_text("a few words")
    with pytest.raises(ConfigurationError, match="more than 256 tokens.*longer texts"):
        prepared(tmp_path, "--data", str(path))


def test_without_the_datasets_library_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigurationError, match="pip install datasets"):
        prepared(tmp_path, "--data", "hf:org/chats")


def test_a_dataset_may_be_fetched_for_the_bundled_model(tmp_path, capsys, monkeypatch):
    def load(name, split, streaming):
        raise OSError(f"offline: {os.environ.get('HF_HUB_OFFLINE')}")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    out = str(tmp_path / "p.profile")
    assert cli.main(["calibrate", "recall", "--out", out, "--data", "hf:org/chats"]) == 2
    assert "offline: None" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(tmp_path, llama):
    with pytest.raises(ConfigurationError, match="tokenizer of .* cannot be loaded"):
        prepared(tmp_path, model=str(llama))


def test_a_ratio_that_the_chunk_does_not_allow_is_left_out(tmp_path):
    plan = prepared(
        tmp_path, "--samples", "4", "--max-tokens", "300", "--compression-chunk-size", "128"
    )
    assert plan.ratios == (0.5, 0.25)
