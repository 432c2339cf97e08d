"""The ceiling: its model against transformers' and the recall model's own, its oracle, lines."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from benchmarks.accuracy import ceiling, ceiling_report, plain
from benchmarks.accuracy.ceiling import Bench, Setting, make_talk
from benchmarks.accuracy.ceiling_run import Run, by_label, by_scorer, prepare
from benchmarks.accuracy.plain import Sizes, static
from models.recall import model as recall
from tangram.bundled import recall_model_path
from tangram.errors import ConfigurationError
from tangram.evaluate import tasks
from tangram.evaluate.chat import ChatFormat
from tangram.evaluate.play import make_script
from tangram.scorers import get_scorer
from tangram.scorers.shares import threshold_shares

SMALL = Sizes(chunk=64, window=8, sinks=4)


def load(folder, attention):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return prepare(load(tiny_model, "eager"))


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 250, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def recall_bench():
    folder = str(recall_model_path())
    chat = ChatFormat.load(folder)
    script = make_script("recall", tasks.get_task("recall"), tasks.Sizes(1400, 2, 12, 1), chat)
    model = load(folder, "sdpa")
    tokenizer = chat._tokenizer
    encode = partial(tokenizer.encode, add_special_tokens=False)
    talks = [make_talk(script, n, chat, encode) for n in range(2)]

    bench = Bench(model, [model.config.eos_token_id], tokenizer.decode, None, None, "forced")

    def make(judge):
        bench.judge = judge
        return bench, script, talks

    return make


def everything(run_of, ids):
    return run_of.read(ids, range(len(ids)))


def rows(count, heads=2, layers=2):
    return static(torch.full((layers, heads), count))


def test_full_kv_is_transformers_own(tiny, tiny_model, ids):
    with torch.inference_mode():
        expected = load(tiny_model, "sdpa")(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(everything(Run(tiny, SMALL), ids), expected, rtol=1e-4, atol=1e-4)


def test_the_oracle_with_ratio_1_is_full_attention_exactly(tiny, ids):
    full = Run(tiny, SMALL, labels_from=250)
    expected = everything(full, ids)
    run = Run(tiny, SMALL, by_label(full.label), rows(SMALL.chunk))
    assert torch.equal(everything(run, ids), expected)
    assert len(run.kept_rows) == 300 // 64
    fewer = Run(tiny, SMALL, by_label(full.label), rows(16))
    assert not torch.equal(everything(fewer, ids)[64:], expected[64:])


def test_reading_in_pieces_and_in_forks_changes_nothing(tiny, ids):
    def make():
        scorer = by_scorer(get_scorer("snap_kv"), SMALL.window, None)
        return Run(tiny, SMALL, scorer, rows(16))

    expected = everything(make(), ids)
    run = make()
    run.read(ids[:50])
    fork = run.fork()
    fork.read([5] * 100)
    run.read(ids[50:130])
    found = run.read(ids[130:], range(130, 300))
    torch.testing.assert_close(found, expected[130:], rtol=1e-5, atol=1e-5)
    assert run.length == 300 and fork.length == 150


def test_the_label_is_the_largest_attention_of_later_questions(tiny, tiny_model, ids):
    first = 150
    full = Run(tiny, SMALL, labels_from=first)
    full.read(ids)
    with torch.inference_mode():
        paid = load(tiny_model, "eager")(torch.tensor([ids]), output_attentions=True).attentions
    expected = torch.zeros(2, 2, 300)
    for layer, weights in enumerate(paid):
        of_head = weights[0].unflatten(0, (2, 2)).amax(dim=1)  # [kv_heads, queries, tokens]
        for chunk in range(300 // 64):
            begin, end = max(0, chunk * 64 - 8), (chunk + 1) * 64 - 8
            asked = of_head[:, max(first, (chunk + 1) * 64) :, begin:end]
            expected[layer, :, begin:end] = asked.amax(dim=1)
    torch.testing.assert_close(full.label, expected, rtol=1e-3, atol=1e-5)


def test_a_context_that_is_computed_in_full_is_full_kvs(tiny, ids):
    expected = everything(Run(tiny, SMALL), ids)
    run = Run(tiny, SMALL, by_scorer(get_scorer("key_diff"), 8, None), rows(16), sees_all=200)
    found = everything(run, ids)
    assert torch.equal(found[:200], expected[:200])
    assert not torch.equal(found[200:], expected[200:])


@pytest.mark.parametrize("name", ["key_diff", "snap_kv", "tova"])
def test_a_scorers_run_is_that_of_the_recall_models_own_code(name, recall_bench):
    bench, _, talks = recall_bench("forced")
    sizes = Sizes()
    keep = bench.keep(Setting(sizes, name, "uniform", 0.25), talks, 0)
    tokens = torch.tensor(talks[0].tokens)
    own = plain.Run(recall.load(recall_model_path()).eval(), get_scorer(name), sizes, keep)
    expected = own.likeliest(tokens)
    run = bench.run(Setting(sizes, name, "uniform", 0.25), talks, 0)
    found = run.read(talks[0].tokens, range(len(tokens))).argmax(dim=-1)
    answers = [b + step - 1 for b in talks[0].begins for step in range(2)]
    assert found[answers].tolist() == expected[answers].tolist()
    assert (found == expected).double().mean() > 0.99
    assert torch.equal(torch.stack(run.kept_rows), torch.stack(own.kept_rows))


@pytest.mark.parametrize("judge", ["forced", "greedy"])
def test_the_oracle_answers_what_full_kv_does_where_a_scorer_does_not(judge, recall_bench):
    bench, script, talks = recall_bench(judge)
    sizes = Sizes()

    def right(*setting):
        figures = bench.play(Setting(sizes, *setting), script, talks)
        assert [len(scores) for scores in figures["scores"]] == [12, 12]
        return sum(map(sum, figures["scores"]))

    assert right() == 24
    assert right("oracle", "static", 0.1) >= 23
    assert right("key_diff", "uniform", 0.1) < 20


def test_budgets_spend_what_the_ratio_allows(recall_bench):
    bench, _, talks = recall_bench("forced")
    sizes = Sizes()
    for budgets in ("uniform", "static", "own"):
        keep = bench.keep(Setting(sizes, "oracle", budgets, 0.25), talks, 0)
        run = Run(bench.model, sizes, by_label(bench.label(talks[0], sizes)), keep)
        run.read(talks[0].tokens)
        for kept in run.kept_rows[1:]:
            assert kept.sum() == 0.25 * 256 * 6 * 4 and kept.min() >= 16
        assert len(torch.stack(run.kept_rows[1:]).unique(dim=0)) == 1
    free = bench.run(Setting(sizes, "oracle", "free", 0.25), talks, 0)
    free.read(talks[0].tokens)
    sealed = len(talks[0].tokens) // 256 * 256 - 32
    kept = torch.stack(free.kept_rows)
    assert float(kept.sum()) == pytest.approx(0.25 * sealed * 6 * 4, rel=0.01)
    assert len(kept[1:].unique(dim=0)) > 1


def test_static_shares_are_of_the_other_conversations_alone(recall_bench):
    bench, _, talks = recall_bench("forced")
    sizes = Sizes()
    order = torch.arange(256).repeat(6, 4, 1).transpose(1, 2)
    static_of = [
        bench.keep(Setting(sizes, "oracle", "static", 0.25), talks, n)(order) for n in (0, 1)
    ]
    own_of = [bench.keep(Setting(sizes, "oracle", "own", 0.25), talks, n)(order) for n in (0, 1)]
    # With two conversations, the others of one are the other.
    assert torch.equal(static_of[0], own_of[1]) and torch.equal(static_of[1], own_of[0])
    assert not torch.equal(own_of[0], own_of[1])
    label = bench.label(talks[0], sizes)[:, :, : len(talks[0].tokens) // 256 * 256 - 32]
    shares = bench.shares(talks[0], sizes, 0.25)
    assert shares.mean() == pytest.approx(0.25)
    ranks = label.flatten().argsort().argsort().view_as(label)
    exact = threshold_shares(ranks, [0.25])["crosslayer"][0].numpy()
    assert np.abs(shares - exact).max() < 0.02


def run_command(tiny_model, out, *more):
    return ceiling.main(
        ["--model", str(tiny_model), "--tasks", "multikey", "--context-tokens", "1500",
         "--questions", "4", "--questions-per-conversation", "2", "--chunk-sizes", "64", "128",
         "--ratios", "0.5", "--window-size", "8", "--device", "cpu", "--dtype", "float32",
         "--out", str(out), *more]
    )  # fmt: skip


def test_lines_and_tables_and_no_cell_twice(tiny_model, tmp_path, capsys, monkeypatch):
    out = tmp_path / "lines.jsonl"
    assert run_command(tiny_model, out, "--judge", "forced") == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    # Full KV, and for both chunk sizes 4 budgets of the oracle and 3 of the scorer.
    assert len(lines) == 1 + 2 * (4 + 3) == len({line["digest"] for line in lines})
    for line in lines:
        assert [len(scores) for scores in line["scores"]] == [2, 2]
        assert line["sha256_of"] == "weights" and line["gold_nats"] > 0
        assert line["versions"]["torch"] and line["command"][-1] == "forced" and line["machine"]
    printed = capsys.readouterr().out
    assert "full KV" in printed and "budgets: oracle, own - static" in printed

    def fail(*args):
        raise AssertionError("a cell was played again")

    monkeypatch.setattr(Bench, "play", fail)
    assert run_command(tiny_model, out, "--judge", "forced") == 0
    assert capsys.readouterr().out == printed
    assert ceiling.main(["--report", str(out)]) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(AssertionError, match="played again"):
        run_command(tiny_model, out, "--judge", "forced", "--context", "full")


def test_what_cannot_be_measured_is_named(tiny_model, tmp_path):
    out = tmp_path / "lines.jsonl"
    with pytest.raises(ConfigurationError, match="--profile FILE"):
        run_command(tiny_model, out, "--budgets", "profile")
    with pytest.raises(ConfigurationError, match="--budgets static"):
        run_command(tiny_model, out, "--questions", "2")
    with pytest.raises(ConfigurationError, match="--out"):
        ceiling.main(["--model", str(tiny_model)])


def cell(ranking, budgets, scores, **changes):
    return {
        "ranking": ranking, "budgets": budgets, "scores": scores, "ratio": 0.25, "chunk_size": 256,
        "context": "compressed", "model": "m", "task": "t", "context_tokens": 4096,
        "judge": "greedy", "sha256": "s", "dtype": "d", "script": "one", **changes,
    }  # fmt: skip


def test_the_report_tells_what_is_lost_to_what():
    cells = [
        cell(None, None, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        cell("oracle", "free", [[1, 1, 1, 1], [1, 1, 1, 1]]),
        cell("oracle", "own", [[1, 1, 1, 1], [1, 1, 1, 0]]),
        cell("oracle", "static", [[1, 1, 1, 1], [1, 1, 0, 0]]),
        cell("oracle", "uniform", [[1, 1, 1, 1], [1, 0, 0, 0]]),
        cell("key_diff", "static", [[1, 1, 0, 0], [0, 0, 0, 0]]),
        cell("key_diff", "static", [[0, 0], [0, 0]], script="without full KV"),
    ]
    text = ceiling_report.report(cells)
    assert "full KV 8 of 8" in text
    lost = text.splitlines()[-1]
    assert lost == "| 0.25 | 256 | +12.5 | +12.5 | +25.0 | +50.0 |"
    assert "25.0 (0.0 to 50.0)" in text
