"""Intervals, files of cells, and plots of them."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tangram.errors import ConfigurationError
from tangram.evaluate import plot
from tangram.evaluate.results import append_cell, read_cells, wilson_interval


def cell(task="recall", scorer="key_diff", ratio=0.25, accuracy=0.5, **changes):
    made = {
        "digest": f"{task}/{scorer}/{ratio}",
        "task": task,
        "context_tokens": 4096,
        "scorer": scorer,
        "level": "uniform" if scorer else None,
        "ratio": ratio,
        "accuracy": accuracy,
        "interval_95": [accuracy / 2, (1 + accuracy) / 2],
        "chunk_size": 256 if scorer else None,
    }
    return {**made, **changes}


@pytest.mark.parametrize(
    ("right", "questions", "low", "high"),
    # By the closed form, worked out apart; at 0 and n one end is exact.
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
        (1, 2, 0.0945, 0.9055),
    ],
)
def test_the_wilson_interval(right, questions, low, high):
    assert wilson_interval(right, questions) == pytest.approx((low, high), abs=5e-4)


def test_cells_come_back_and_the_last_of_a_digest_counts(tmp_path):
    path = tmp_path / "cells.jsonl"
    for made in (cell(accuracy=0.1), cell(ratio=0.5), cell(accuracy=0.9)):
        append_cell(path, made)
    found = read_cells(path, "--out")
    assert [(c["ratio"], c["accuracy"]) for c in found] == [(0.5, 0.5), (0.25, 0.9)]


def test_a_line_that_was_cut_off_is_passed_over_and_replaced(tmp_path):
    path = tmp_path / "cells.jsonl"
    append_cell(path, cell())
    whole = path.read_text()
    path.write_text(whole + '{"digest": "x", "ta')
    assert len(read_cells(path, "--out")) == 1
    append_cell(path, cell(ratio=0.5))
    assert path.read_text().startswith(whole)
    assert [c["ratio"] for c in read_cells(path, "--out")] == [0.25, 0.5]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "cells.jsonl"
    append_cell(path, cell())
    path.write_text(path.read_text().rstrip("\n"))
    append_cell(path, cell(ratio=0.5))
    assert [c["ratio"] for c in read_cells(path, "--out")] == [0.25, 0.5]
    assert path.read_text().count("\n") == 2


def test_a_line_that_was_cut_within_a_letter_is_replaced(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_bytes('{"task": "\u5317'.encode()[:-1])
    append_cell(path, cell())
    assert [c["ratio"] for c in read_cells(path, "--out")] == [0.25]


def test_what_another_process_adds_meanwhile_stays(tmp_path):
    path = tmp_path / "cells.jsonl"
    made = [cell(ratio=ratio) for ratio in (0.1, 0.2, 0.3, 0.4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: [append_cell(path, one) for _ in range(50)], made))
    assert path.read_text().count("\n") == 200
    assert {c["ratio"] for c in read_cells(path, "--out")} == {0.1, 0.2, 0.3, 0.4}


def test_a_text_of_one_line_is_no_cell_that_was_cut_off(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("remember the milk")
    with pytest.raises(ConfigurationError, match=r"--out .*notes.txt, line 1: not JSON"):
        read_cells(path, "--out")


@pytest.mark.parametrize("line", ['{"a": 1}', "[1]", "text\n{}"])
def test_a_file_of_something_else_is_refused(tmp_path, line):
    path = tmp_path / "other.jsonl"
    append_cell(path, cell())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigurationError, match="--plot-only .*other.jsonl, line 2: not"):
        read_cells(path, "--plot-only")


def drawn(tmp_path, cells, name="plot.svg"):
    path = tmp_path / name
    plot.draw(cells, path)
    return path.read_text()


def texts(svg):
    """What is written in a picture."""
    return re.findall(r">([^<>]+)</text>", svg)


def test_a_plot_has_a_panel_for_each_task_and_scorer_and_a_line_for_each_level(tmp_path):
    cells = [cell(task, None, 1.0, 0.9) for task in ("recall", "niah_single")]
    cells += [
        cell(task, scorer, ratio) | {"level": level}
        for task in ("recall", "niah_single")
        for scorer in ("key_diff", "tova")
        for ratio in (0.25, 0.5)
        for level in ("uniform", "error")
    ]
    svg = drawn(tmp_path, cells)
    written = texts(svg)
    for scorer in ("key_diff", "tova"):
        assert written.count(scorer) == 2
    for task in ("niah_single", "recall"):
        assert written.count(f"{task}, 4,096 tokens") == 2
    for line in ("uniform", "error", "full KV"):  # in the legend, which all panels share
        assert written.count(line) == 1
    assert svg == drawn(tmp_path, json.loads(json.dumps(cells)), "again.svg")


def drawn_points(tmp_path, cells, monkeypatch):
    """Title of each panel -> row, column, (ratio, accuracy) of its lines, and full KV's."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: kept.append(figure))
    plot.draw(cells, tmp_path / "plot.svg")
    found = {}
    for axis in kept[0].axes:
        if axis.axison:
            lines = [line.lines[0].get_xydata().tolist() for line in axis.containers]
            full = [line.get_ydata()[0] for line in axis.lines if line.get_color() == "black"]
            place = axis.get_subplotspec()
            found[axis.get_title()] = (place.rowspan.start, place.colspan.start, lines, full)
    return found


@pytest.mark.parametrize(
    ("name", "values", "titles"),
    [
        ("model", ("org/one", "two"), ("org/one", "two")),
        ("dtype", ("bfloat16", "float32"), ("bfloat16", "float32")),
        ("seed", (1, 2), ("seed 1", "seed 2")),
    ],
)
def test_other_models_dtypes_and_seeds_have_panels_apart(
    tmp_path, name, values, titles, monkeypatch
):
    cells = [
        cell(scorer=scorer, ratio=ratio, accuracy=accuracy + more, **{name: value})
        for value, accuracy in zip(values, (0.75, 0.25), strict=True)
        for scorer, ratio, more in ((None, 1, 0.1), ("key_diff", 0.25, 0), ("key_diff", 0.5, 0))
    ]
    found = drawn_points(tmp_path, cells, monkeypatch)
    assert found == {
        f"key_diff\n{title}\nrecall, 4,096 tokens": (
            0, column, [[[0.25, accuracy], [0.5, accuracy]]], [accuracy + 0.1],
        )
        for column, (title, accuracy) in enumerate(zip(titles, (0.75, 0.25), strict=True))
    }  # fmt: skip


def test_several_scorers_stand_beside_each_other(tmp_path, monkeypatch):
    scorers = ("a", "b", "c", "d", "e")
    cells = [
        cell(task, scorer)
        for task in ("one", "two")
        for scorer in scorers
        if task + scorer != "oneb"
    ]
    found = drawn_points(tmp_path, cells, monkeypatch)
    assert {title: place[:2] for title, place in found.items()} == {
        f"{scorer}\n{task}, 4,096 tokens": (row, scorers.index(scorer))
        for row, task in enumerate(("one", "two"))
        for scorer in scorers
        if task + scorer != "oneb"
    }


def test_other_parameters_of_a_scorer_have_a_panel_of_their_own(tmp_path, monkeypatch):
    cells = [cell(scorer="snap_kv"), cell(scorer="snap_kv", scorer_parameters={"kernel_size": 7})]
    found = drawn_points(tmp_path, cells, monkeypatch)
    assert [title.split("\n")[0] for title in found] == ["snap_kv", "snap_kv(kernel_size=7)"]


def test_panels_of_one_scorer_are_wrapped(tmp_path, monkeypatch):
    found = drawn_points(tmp_path, [cell(f"task {n}") for n in range(6)], monkeypatch)
    assert [place[:2] for place in found.values()] == [(0, n) for n in range(4)] + [(1, 0), (1, 1)]


def test_sizes_that_differ_make_lines_of_their_own(tmp_path):
    svg = drawn(tmp_path, [cell(chunk_size=128), cell(chunk_size=256, digest="b")])
    assert {"uniform, C = 128", "uniform, C = 256"} <= set(texts(svg))


# What is seen of linear red, green and blue (Machado, Oliveira and Fernandes, 2009).
DICHROMATS = {
    "no red": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "no green": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


def test_levels_differ_in_marker_and_in_colours_that_all_readers_tell_apart(tmp_path, monkeypatch):
    from matplotlib.colors import to_hex, to_rgb

    from tangram.budgets import LEVELS

    drawn_lines = []
    draw_line = plot._draw_line
    monkeypatch.setattr(
        plot, "_draw_line", lambda *given: drawn_lines.append(draw_line(*given)) or drawn_lines[-1]
    )
    cells = [
        cell(ratio=ratio, digest=level) | {"level": level}
        for level in LEVELS
        for ratio in (0.25, 0.5)
    ]
    plot.draw(cells, tmp_path / "plot.svg")
    styles = {(line[0].get_marker(), to_hex(line[0].get_color())) for line in drawn_lines}
    assert len({marker for marker, _ in styles}) == len({c for _, c in styles}) == len(LEVELS)
    for matrix in DICHROMATS.values():
        light = np.array([to_rgb(colour) for _, colour in sorted(styles)]) ** 2.2
        seen = np.clip(light @ np.array(matrix).T, 0, 1) ** (1 / 2.2)
        gaps = [np.linalg.norm(one - other) for i, one in enumerate(seen) for other in seen[:i]]
        assert min(gaps) > 0.15  # matplotlib's own first six: 0.05 and 0.12


def test_halving_a_ratio_costs_the_same_width_everywhere(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **more: kept.append(figure))
    plot.draw([cell(ratio=ratio) for ratio in (0.0625, 0.5)], tmp_path / "plot.svg")
    (axis,) = (axis for axis in kept[0].axes if axis.axison)
    at = [axis.transData.transform((ratio, 0.5))[0] for ratio in (0.0625, 0.125, 0.25, 0.5, 1)]
    steps = [right - left for left, right in zip(at, at[1:], strict=False)]
    assert steps == pytest.approx([steps[0]] * 4)
    low, high = axis.get_xlim()
    assert low < 0.0625 and high > 1
    assert axis.xaxis.get_major_formatter()(0.125, 0) == "0.125"


def test_what_cannot_be_drawn_is_told(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match="nothing to draw"):
        plot.draw([], tmp_path / "plot.svg")
    for name in ("plot.nothing", "plot"):
        with pytest.raises(ConfigurationError, match=f"{name} cannot be written: its ending"):
            plot.draw([cell()], tmp_path / name)
    with pytest.raises(ConfigurationError, match="--plot .* cannot be written: .*No such file"):
        plot.draw([cell()], tmp_path / "nowhere" / "plot.svg")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backend_bases", None)
    with pytest.raises(ConfigurationError, match=re.escape("pip install 'tangram-kv[plots]'")):
        plot.require_plots(tmp_path / "plot.svg")
