"""`tangram evaluate` with engines that look the answers up: cells, resuming, errors, the table."""

import json
import re
from dataclasses import replace

import pytest

from tangram import cli
from tangram.cli import evaluate
from tangram.cli.evaluate_options import parser
from tangram.errors import ConfigurationError, UnsupportedError
from tangram.evaluate.cells import Grid, make_settings
from tangram.plan.models import bundled_model, read_config
from tangram.profile import ERROR_CURVE, QUERY_MEAN, ModelIdentity, Profile

SMALL = (
    "recall", "--context-tokens", "300", "--conversations", "2", "--questions", "2",
    "--profile", "none",
)  # fmt: skip
PARAMETERS = "--compression-scorer-parameters"


class Lookup:
    """Knows every right answer; with compression it knows only half of the conversations."""

    device = "a shelf"

    def __init__(self, scripts, compressed):
        self.closed = False
        self.budgets = []
        self._answers = {}
        for script in scripts:
            for number, (talk, prompts) in enumerate(
                zip(script.dialogues, script.prompts, strict=True)
            ):
                for question, prompt in zip(talk.questions, prompts[1:], strict=True):
                    known = not compressed or number % 2 == 0
                    self._answers[prompt] = question.gold if known else "?"

    def answer(self, prompts, max_tokens):
        return [(self._answers.get(tuple(prompt), ""), len(prompt) // 2) for prompt in prompts]

    def swap_budgets(self, head_groups):
        assert not self.closed
        self.budgets.append(head_groups)

    def close(self):
        self.closed = True


@pytest.fixture
def shelf(monkeypatch):
    """Every engine that was made, with its setting; `scripts` are those of the evaluation."""
    made = []
    prepare = evaluate.prepare

    def prepared(args, argv):
        made.append(prepare(args, argv))
        return made[-1]

    engines = []

    def make_engine(model, setting, max_model_len, options):
        engine = Lookup(made[-1].scripts, setting.options is not None)
        engines.append((setting, engine, max_model_len, options))
        return engine

    monkeypatch.setattr(evaluate, "prepare", prepared)
    monkeypatch.setattr(evaluate, "make_engine", make_engine)
    return engines


@pytest.fixture
def no_engine(monkeypatch):
    def fail(*args):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(evaluate, "make_engine", fail)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_cells_and_the_table(shelf, tmp_path, capsys):
    out = tmp_path / "cells.jsonl"
    argv = ["evaluate", *SMALL, "--ratios", "0.5,0.25", "--scorers", "key_diff,tova"]
    assert cli.main([*argv, "--out", str(out)]) == 0
    cells = lines(out)
    assert [(c["scorer"], c["ratio"], c["accuracy"]) for c in cells] == [
        (None, 1.0, 1.0),
        ("key_diff", 0.5, 0.5),
        ("key_diff", 0.25, 0.5),
        ("tova", 0.5, 0.5),
        ("tova", 0.25, 0.5),
    ]
    assert all(engine.closed for _, engine, *_ in shelf) and len(shelf) == 5
    full, compressed = cells[0], cells[2]
    assert full["layout"] is None and full["level"] is None
    assert (compressed["right"], compressed["questions"]) == (2, 4)
    assert compressed["full_accuracy"] == 1
    assert compressed["interval_95"] == pytest.approx([0.150, 0.850], abs=1e-3)
    assert compressed["kv_bytes_per_token"] == full["kv_bytes_per_token"] / 4
    assert compressed["layout"] == shelf[2][0].plan.geometry.digest
    assert (compressed["chunk_size"], compressed["page_group_size"]) == (256, 1)
    assert 0.49 < compressed["prefix_cache_hit_share"] < 0.51
    assert compressed["command"] == ["tangram", *argv, "--out", str(out)]
    assert compressed["device"] == "a shelf" and compressed["versions"]["vllm"]
    assert [r["score"] for r in compressed["replies"]] == [1, 0, 1, 0]

    table = capsys.readouterr().out
    (row,) = [row for row in table.splitlines() if "tova" in row and "0.25" in row]
    found = ["tova", "uniform", "0.25", "2/4", "50.0", "15-85", "50.0", "3,072"]
    assert row.split()[: len(found)] == found
    assert "recall, 300 tokens" in table
    assert "C = 256, W = 32, S = 4, H_p = 1" in table


def test_figures_are_whole_on_a_narrow_terminal(shelf, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    argv = ["--ratios", "0.5", "--scorers", "tova", "--chunk-sizes", "64,128"]
    assert cli.main(["evaluate", *SMALL, *argv]) == 0
    table = capsys.readouterr().out
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("tova") == table.count("15-85") == 2


def test_tables_in_a_file_are_as_wide_as_they_need_to_be(shelf, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    argv = ["--scorers", "streaming_llm", "--chunk-sizes", "64,128", "--window-sizes", "8,16",
            "--sink-tokens", "2,4", "--ratios", "0.5"]  # fmt: skip
    assert cli.main(["evaluate", *SMALL, *argv]) == 0
    table = capsys.readouterr().out.splitlines()
    assert sum("streaming_llm" in row and "15-85" in row for row in table) == 8
    assert max(map(len, table)) > 80


def test_without_a_terminal_every_cell_has_a_plain_line(shelf, capsys):
    assert cli.main(["evaluate", *SMALL, "--ratios", "0.5", "--context-tokens", "300,400"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [re.sub(r"\d+ s$", "s", line) for line in said] == [
        "full KV: starting, 8 questions",
        "full KV: recall, 300 tokens: 4 of 4 right, s",
        "full KV: recall, 400 tokens: 4 of 4 right, s",
        "key_diff, uniform, ratio 0.5: starting, 8 questions",
        "key_diff, uniform, ratio 0.5: recall, 300 tokens: 2 of 4 right, s",
        "key_diff, uniform, ratio 0.5: recall, 400 tokens: 2 of 4 right, s",
    ]


def test_sizes_that_differ_have_a_column(shelf, capsys):
    argv = ["--ratios", "0.5", "--chunk-sizes", "64,128", "--context-tokens", "300,400"]
    assert cli.main(["evaluate", *SMALL, *argv]) == 0
    table = capsys.readouterr().out
    assert len(shelf) == 3
    rows = [row.split() for row in table.splitlines() if "key_diff" in row]
    assert [row[2:4] for row in rows] == [["0.5", "64"], ["0.5", "128"]] * 2
    assert table.index("300 tokens") < table.index("400 tokens")
    assert "\nW = 32, S = 4, H_p = 1" in table


def test_every_engine_has_room_for_all_conversations(shelf):
    assert cli.main(["evaluate", *SMALL, "--ratios", "0.5"]) == 0
    ((setting, _, longest, options), _) = shelf
    assert 300 < longest < 340
    assert options["enforce_eager"] is True
    assert options["kv_cache_memory_bytes"] > setting.token_bytes * 2 * longest


def test_the_config_is_that_of_the_revision(hub):
    """Conversations were as long, and the network was told by the config of the main branch."""
    engine = ("--engine", "revision=old", "--engine", f"tokenizer={bundled_model()}")
    argv = [hub, *SMALL[1:], *engine, "--dtype", "float32"]
    evaluation = evaluate.prepare(parser().parse_args(argv), argv)
    network = ModelIdentity.from_config(read_config("recall"))
    assert evaluation.identity["network"] == network.to_dict()
    assert evaluation.engine_options["revision"] == "old"


def test_the_config_is_that_which_the_engine_is_told_to_take():
    argv = [*SMALL, "--engine", 'hf_overrides={"rms_norm_eps": 0.5}', "--dtype", "float32"]
    evaluation = evaluate.prepare(parser().parse_args(argv), argv)
    network = ModelIdentity.from_config({**read_config("recall"), "rms_norm_eps": 0.5})
    assert evaluation.identity["network"] == network.to_dict()


def test_options_of_the_engine_are_handed_on(shelf):
    argv = ["--engine", "max-num-seqs=3", "--engine", "enforce_eager=false"]
    assert cli.main(["evaluate", *SMALL, *argv, "--max-model-len", "999"]) == 0
    _, _, longest, options = shelf[0]
    assert longest == 999
    assert (options["max_num_seqs"], options["enforce_eager"]) == (3, False)


def test_cells_that_are_there_are_not_played_again(shelf, tmp_path, capsys):
    out = tmp_path / "cells.jsonl"
    argv = ["evaluate", *SMALL, "--out", str(out)]
    assert cli.main([*argv, "--ratios", "0.5"]) == 0
    assert len(shelf) == 2
    first = out.read_text()
    assert cli.main([*argv, "--ratios", "0.5"]) == 0
    assert len(shelf) == 2 and out.read_text() == first
    capsys.readouterr()
    assert cli.main([*argv, "--ratios", "0.5,0.25"]) == 0
    assert [setting.options.compression_ratio for setting, *_ in shelf[2:]] == [0.25]
    assert len(lines(out)) == 3
    assert lines(out)[-1]["full_accuracy"] == 1
    assert capsys.readouterr().out.count("key_diff") == 2
    for change in (["--seed", "2"], ["--questions", "1"], ["--engine", "seed=3"]):
        before = len(shelf)
        assert cli.main([*argv, "--ratios", "0.5", *change]) == 0
        assert len(shelf) == before + 2, change


def test_other_statistics_of_the_scorer_are_another_cell(shelf, tmp_path):
    """With uniform budgets the layout is the same whatever the profile."""
    bundled = Profile.load(bundled_model() / "expected_attention.profile")
    one, other, budgets = (tmp_path / f"{name}.profile" for name in ("one", "other", "budgets"))
    bundled.save(one)
    changed = {QUERY_MEAN: bundled.arrays[QUERY_MEAN] * 1.5}
    replace(bundled, arrays={**bundled.arrays, **changed}).save(other)
    changed = {ERROR_CURVE: bundled.arrays[ERROR_CURVE] * 0.5}
    replace(bundled, arrays={**bundled.arrays, **changed}).save(budgets)
    argv = ["evaluate", *SMALL[:-2], "--ratios", "0.5", "--scorers", "expected_attention",
            "--levels", "uniform", "--out", str(tmp_path / "cells.jsonl")]  # fmt: skip
    played = []
    for profile in (one, one, other, one, budgets):
        assert cli.main([*argv, "--profile", str(profile)]) == 0
        played.append(len(shelf))
    assert played == [2, 2, 3, 3, 3]  # full KV once, then each that the scorer sees as new


def test_other_parameters_of_the_scorer_are_another_cell(shelf, tmp_path, capsys):
    out = tmp_path / "cells.jsonl"
    argv = ["evaluate", *SMALL, "--ratios", "0.5", "--scorers", "snap_kv", "--out", str(out)]
    played = []
    for given in (None, "{}", '{"kernel_size": 5}', '{"kernel_size": 7}',
                  '{"SnapKV": {"kernel_size": 7}}', '{"snap_kv": {}}'):  # fmt: skip
        parameters = () if given is None else ("--compression-scorer-parameters", given)
        assert cli.main([*argv, *parameters]) == 0
        played.append(len(shelf))
    assert played == [2, 2, 2, 3, 3, 3]  # full KV once, then the defaults and the others
    assert shelf[2][0].options.compression_scorer_parameters == {"kernel_size": 7}
    assert [cell.get("scorer_parameters") for cell in lines(out)] == [
        None,
        None,
        {"kernel_size": 7},
    ]
    assert capsys.readouterr().out.count("snap_kv(kernel_size=7)") == 2


def test_cells_of_default_parameters_are_those_of_earlier_files():
    (full, plain) = (s.to_json() for s in settings(scorers=["snap_kv"]))
    assert "scorer_parameters" not in {**full, **plain}


def test_of_several_scorers_parameters_are_given_by_name():
    argv = [*SMALL, "--scorers", "snap_kv,tova", "--ratios", "0.5"]
    argv += ["--compression-scorer-parameters", '{"snap-kv": {"kernel_size": 7}}']
    _, *found = evaluate.prepare(parser().parse_args(argv), argv).settings
    assert [s.plan.scorer_parameters for s in found] == [{"kernel_size": 7}, {}]
    assert [s.title for s in found] == [
        "snap_kv(kernel_size=7), uniform, ratio 0.5", "tova, uniform, ratio 0.5"
    ]  # fmt: skip


def test_what_was_played_before_an_engine_failed_is_kept(shelf, tmp_path, monkeypatch):
    out = tmp_path / "cells.jsonl"
    make_engine = evaluate.make_engine

    def failing(model, setting, *rest):
        engine = make_engine(model, setting, *rest)
        if setting.options:
            engine.answer = None  # not callable
        return engine

    monkeypatch.setattr(evaluate, "make_engine", failing)
    with pytest.raises(TypeError):
        cli.main(["evaluate", *SMALL, "--ratios", "0.5", "--out", str(out)])
    assert [cell["scorer"] for cell in lines(out)] == [None]
    assert all(engine.closed for _, engine, *_ in shelf)


def test_settings_that_differ_in_budgets_share_an_engine(shelf):
    argv = ["evaluate", *SMALL[:-2], "--scorers", "expected_attention", "--ratios", "0.5,0.25",
            "--levels", "uniform,mass,error"]  # fmt: skip
    assert cli.main(argv) == 0
    played = [(setting.options.compression_ratio, engine.budgets)
              for setting, engine, *_ in shelf if setting.options]  # fmt: skip
    assert [ratio for ratio, _ in played] == [0.5, 0.25]
    for _, budgets in played:
        assert len(budgets) == len(set(budgets)) == 2
    assert all(engine.closed for _, engine, *_ in shelf)

    shelf.clear()
    assert cli.main([*argv, "--engine", "enforce_eager=false"]) == 0  # graphs keep their tables
    assert len(shelf) == 1 + 2 * 3


def test_drawing_from_a_file(shelf, tmp_path, capsys):
    out, one, two = (tmp_path / name for name in ("cells.jsonl", "one.svg", "two.svg"))
    argv = ["evaluate", *SMALL, "--ratios", "0.5", "--out", str(out), "--plot", str(one)]
    assert cli.main(argv) == 0
    assert cli.main(["evaluate", "--plot-only", str(out), "--plot", str(two)]) == 0
    assert one.read_text() == two.read_text()
    assert "recall, 300 tokens" in one.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "quiz"], "unknown task 'quiz' in --tasks"),
        (["--tasks", "locomo:/none.json"], "/none.json is not one"),
        (["--tasks", "niah_single"], "cannot represent the task's text"),
        (["--context-tokens", "40000"], "--context-tokens is 40000, and the model takes 32768"),
        (["--context-tokens", "20"], "--context-tokens is 20"),
        (["--max-model-len", "200"], "--context-tokens is 300, and the model takes 200"),
        (["--max-model-len", "301"], "and the model 301: give less --context-tokens"),
        (["--ratios", "0.5,0.01"], "ratio 0.01 cannot be evaluated"),
        (["--ratios", "0.01"], "the smallest ratio that works is 0.0625"),
        (["--ratios", "2"], "above 0 and at most 1"),
        (["--levels", "uniform,error"], "level error"),
        (["--levels", "best"], "--compression-level is 'best'"),
        (["--scorers", "key_diff,magic"], "unknown --compression-scorer 'magic'"),
        ([PARAMETERS, "7"], "--compression-scorer-parameters is '7': give a JSON object"),
        (
            ["--scorers", "key_diff", PARAMETERS, '{"size": 7}'],
            "key_diff has no parameter size: it takes none",
        ),
        ([PARAMETERS, '{"size": 7}'], "--compression-scorer is auto"),
        ([PARAMETERS, '{"size": 7}', "--scorers", "snap_kv,tova"], "give them by name"),
        ([PARAMETERS, '{"tova": {}, "snap_kv": {}}'], "has some of snap_kv, tova, which"),
        ([PARAMETERS, '{"magic": {}}'], "unknown --compression-scorer 'magic'"),
        (["--scorers", "expected_attention"], "scorer expected_attention"),
        (["--chunk-sizes", "100"], "--compression-chunk-size is 100"),
        (["--page-group-sizes", "3"], "--page-group-size is 3"),
        (
            ["--scorers", "key_diff", "--profile", "/none/{scorer}.profile"],
            "/none/key_diff.profile",
        ),
        (["--profile", "/none/{scorer}.profile"], "/none/auto.profile"),
        (["--engine", "enable_prefix_caching=false"], "--engine enable_prefix_caching"),
        (["--engine", "nothing"], "expected NAME=VALUE"),
        (["--engine", "speed=9"], "--engine: vllm.LLM has no argument speed"),
        (["--engine", "max_num_seqs=few"], "--engine: max_num_seqs is 'few'"),
        (["--out", "/none/cells.jsonl"], "--out /none/cells.jsonl cannot be written"),
        (["--plot", "/none/plot.svg"], "--plot /none/plot.svg cannot be written"),
        (["--plot", "plot.foo"], "--plot plot.foo cannot be written: its ending"),
        (["--tasks", "niah_multikey", "--questions", "6000"], "--questions is 6000: task niah_mu"),
        (["--chat-template", "/none.jinja"], "--chat-template /none.jinja cannot be read"),
        (["--chat-template-options", "[1]"], "expected a JSON object"),
        (["--chat-template-options", '{"tokenize": false}'], "tokenize is no variable"),
        (["--plot-only", "/none.jsonl"], "--plot-only FILE needs --plot FILE"),
        (["--plot-only", "/none.jsonl", "--plot", "x.svg"], "/none.jsonl cannot be read"),
        (["--ratios", "half"], "expected a list like A,B"),
    ],
)
def test_a_mistake_is_told_before_any_engine_starts(arguments, said, no_engine, capsys):
    assert cli.main(["evaluate", *SMALL, *arguments]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_template_that_fails_is_told_before_any_engine_starts(no_engine, tmp_path, capsys):
    template = tmp_path / "template.jinja"
    template.write_text("{{ 1 / 0 }}")
    assert cli.main(["evaluate", *SMALL, "--chat-template", str(template)]) == 2
    assert "ZeroDivisionError: division by zero): give another" in capsys.readouterr().err


def test_a_plot_is_not_drawn_over_its_cells(no_engine, tmp_path, capsys):
    cells = tmp_path / "cells.jsonl"
    cells.write_text("{}\n")
    assert cli.main(["evaluate", "--plot-only", str(cells), "--plot", str(cells)]) == 2
    assert f"--plot {cells} cannot be written" in capsys.readouterr().err
    assert cells.read_text() == "{}\n"


def test_an_out_file_of_something_else_is_not_written_to(no_engine, tmp_path, capsys):
    out = tmp_path / "notes.txt"
    out.write_text("my notes\n")
    assert cli.main(["evaluate", *SMALL, "--out", str(out)]) == 2
    assert "notes.txt, line 1: not JSON" in capsys.readouterr().err
    assert out.read_text() == "my notes\n"


def test_a_model_is_needed(no_engine, capsys):
    assert cli.main(["evaluate"]) == 2
    assert "a MODEL is needed" in capsys.readouterr().err


def settings(**changes):
    grid = Grid(**{**dict(ratios=[0.5], scorers=["key_diff"], profile="none"), **changes})
    return make_settings(grid, "recall", read_config("recall"), 4)


def test_what_the_engine_would_refuse_is_refused_before_one_is_made():
    grid = Grid(ratios=[0.5], scorers=["key_diff"], profile="none")
    config = read_config("recall") | {"sliding_window": 512, "use_sliding_window": True}
    with pytest.raises(UnsupportedError, match="'recall'.*sliding_window 512.*--disable-sliding"):
        make_settings(grid, "recall", config, 4)
    assert len(make_settings(grid, "recall", config, 4, {"disable_sliding_window": True})) == 2
    with pytest.raises(UnsupportedError, match="--tensor-parallel-size 2 yet in --engine: use"):
        make_settings(grid, "recall", read_config("recall"), 4, {"tensor_parallel_size": 2})


def test_the_settings_are_all_combinations():
    found = settings(ratios=[0.5, 0.25], scorers=["KeyDiff", "tova"], chunk_sizes=[64, 128])
    assert found[0].options is None and found[0].title == "full KV"
    made = [
        (s.plan.scorer_name, s.plan.geometry.chunk_size_tokens, s.options.compression_ratio)
        for s in found[1:]
    ]
    assert made == [
        (scorer, chunk, ratio)
        for scorer in ("key_diff", "tova")
        for chunk in (64, 128)
        for ratio in (0.5, 0.25)
    ]


def test_the_same_setting_twice_is_one():
    assert len(settings(scorers=["key_diff", "KeyDiff"], levels=[None, "uniform"])) == 2


def test_the_bundled_profile_of_a_scorer_is_taken_where_there_is_one():
    found = settings(scorers=["expected_attention"], profile=None)
    path = bundled_model() / "expected_attention.profile"
    assert [s.plan.profile_path for s in found[1:]] == [str(path)]
    assert [s.plan.level for s in found[1:]] == ["error"]


def test_uniform_budgets_take_no_profiles_place_unasked(monkeypatch, tmp_path):
    """A scorer without a profile was evaluated with uniform budgets, without a word."""
    monkeypatch.setenv("TANGRAM_CACHE_DIR", str(tmp_path))
    with pytest.raises(ConfigurationError, match="scorer tova is cached.*--profile none"):
        settings(scorers=["tova"], profile=None)
    for said in (dict(profile="none"), dict(levels=["uniform"]), dict(ratios=[1.0])):
        (_, one) = settings(**{**dict(scorers=["tova"], profile=None), **said})
        assert (one.plan.level, one.plan.profile_path) == ("uniform", None)


@pytest.mark.parametrize("asked", ["{folder}", "{folder}/{{scorer}}.profile", "{folder}/{file}"])
def test_profiles_are_found_in_a_folder_and_by_a_pattern(asked):
    file = "expected_attention.profile"
    profile = asked.format(folder=bundled_model(), file=file)
    (_, one) = settings(scorers=["expected_attention"], profile=profile)
    assert one.plan.profile_path == str(bundled_model() / file)


def test_docs_name_every_option_and_task():
    from pathlib import Path

    from tangram.evaluate.tasks import task_names

    text = (Path(__file__).resolve().parents[3] / "docs" / "evaluate.md").read_text()
    options = re.findall(r"--[a-z-]+", evaluate.parser().format_help())
    missing = {name for name in {*options, *task_names()} - {"--help"} if name not in text}
    assert not missing
