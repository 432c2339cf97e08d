"""docs/add-a-scorer.md, followed word for word."""

import re
import sys

import pytest

from tangram.errors import ScorerError
from tangram.scorers import AUTO_SCORER, get_scorer, scorer_names
from tests.page_scorer import PAGE, blocks

DOCS = PAGE.parent


def test_the_page_has_a_class_a_test_and_an_entry_point():
    assert len(blocks("python")) == 2
    assert len(blocks("toml")) == 1


def test_without_the_package_the_name_is_unknown():
    with pytest.raises(ScorerError, match="unknown --compression-scorer 'value_norm'"):
        get_scorer("value_norm")


def test_the_scorer_is_found_and_scores(my_scorers, make_chunks):
    assert "value_norm" in scorer_names()
    assert my_scorers not in sys.modules  # listing names imports no package
    scorer = get_scorer("value-norm")
    assert type(scorer).__module__ == my_scorers
    assert scorer.parameters() == {"order": 2.0}
    chunks = make_chunks((2,))
    assert scorer.score(chunks).shape == chunks.keys.shape[:-1]
    first = get_scorer("value_norm", order=1)
    assert first.score(chunks)[0, 3, 1] == pytest.approx(float(chunks.values[0, 3, 1].abs().sum()))


@pytest.mark.usefixtures("my_scorers")
def test_its_own_test_passes():
    namespace = {"__name__": "test_value_norm"}
    exec(compile(blocks("python")[1], "docs/add-a-scorer.md", "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0]()


@pytest.mark.usefixtures("my_scorers")
@pytest.mark.parametrize("parameters", [{"order": 0.5}, {"size": 1}])
def test_its_parameters_are_checked(parameters):
    with pytest.raises(ScorerError, match="value_norm"):
        get_scorer("value_norm", **parameters)


@pytest.mark.usefixtures("my_scorers")
def test_the_registry_line_is_one_of_the_registry():
    source = (DOCS.parent / "src/tangram/scorers/__init__.py").read_text()
    (line,) = re.findall(r"`(\"value_norm\": \"\w+\",)`", PAGE.read_text())
    pattern = re.escape(line).replace("value_norm", "key_diff").replace("ValueNorm", "KeyDiff")
    assert re.search(rf"^    {pattern}$", source, flags=re.MULTILINE)


@pytest.mark.parametrize("name", scorer_names(third_party=False))
def test_every_scorer_has_a_row_and_a_section(name):
    page = (DOCS / "scorers.md").read_text()
    section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, flags=re.DOTALL | re.MULTILINE)
    assert section is not None
    for parameter, default in get_scorer(name).parameters().items():
        assert f"| `{parameter}` | {default} |" in section[1]
    source = re.search(r"arXiv (\d{4}\.\d{5})", type(get_scorer(name)).__doc__)
    paper = "this project's" if name == "learned" else source[1]
    assert re.search(rf"^\| \[`{name}`\]\(#{name}\) .*{re.escape(paper)}", page, re.MULTILINE)


def test_the_page_names_the_default():
    assert f"(default `{AUTO_SCORER}`)" in (DOCS / "scorers.md").read_text()
