"""The page: one file, nothing from outside, and nothing of a profile that becomes markup."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from tangram import cli
from tangram.profile import Profile

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & <!-- \u2028 '\""


def write(profile, tmp_path, *arguments) -> str:
    source, target = tmp_path / "tiny.profile", tmp_path / "page.html"
    profile.save(source)
    assert cli.main(["report", str(source), "--out", str(target), *arguments]) == 0
    return target.read_text(encoding="utf-8")


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_command_writes_a_page_and_repeats_its_warnings(make_profile, tmp_path, capsys):
    page = write(make_profile(), tmp_path, "--page-group-size", "4")
    assert page.startswith("<!doctype html>")
    told = capsys.readouterr().err
    assert "note: A page group holds all 4 KV heads" in told
    assert "page.html" in told


def test_nothing_is_taken_from_elsewhere(make_profile, tmp_path):
    page = write(make_profile(), tmp_path)
    elements = Elements(page).found
    links = [a for _, a in elements if a.keys() & {"src", "href", "action", "data", "srcset"}]
    assert {a.get("href") for a in links} == {"data:,", "#tiles"}
    assert "http://www.w3.org/2000/svg" in page
    assert set(re.findall(r"https?://[^\s\"']+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", page)


def test_the_policy_allows_this_script_and_this_style_alone(make_profile, tmp_path):
    page = write(make_profile(), tmp_path)
    (policy,) = (a["content"] for t, a in Elements(page).found if "http-equiv" in a)
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_nothing_of_a_profile_becomes_markup(make_profile, tmp_path):
    clean = Elements(write(make_profile(), tmp_path))
    profile = make_profile(
        scorer_name=EVIL,
        scorer_parameters={EVIL: EVIL},
        data={"sha256": EVIL, "n_samples": 12, "description": EVIL},
        extra={"sample_kinds": [EVIL] * 12, "measured": [{"ratio": 0.3, "log": {"origin": EVIL}}]},
    )
    profile = replace(profile, model=replace(profile.model, architecture=EVIL))
    page = write(profile, tmp_path)
    dirty = Elements(page)
    allowed = ("div", "dt", "dd", "li", "ul", "h2", "p")
    assert [t for t, _ in dirty.found if t not in allowed] == [
        t for t, _ in clean.found if t not in allowed
    ]
    assert not any("onerror" in attributes for _, attributes in dirty.found)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(text)["sample_kinds"] == [EVIL] * 12
    assert EVIL in dirty.texts  # the heading, as it is


def test_the_heading_follows_from_what_is_listed(make_profile, tmp_path, without):
    calm, warned, headed = "calls for caution", "No cautions.", "Before you serve with it"
    threshold = make_profile(arrays=without("error", "mass"), extra={"model_name": "org/tiny"})
    kept = Elements(write(make_profile(), tmp_path, "--page-group-size", "1")).texts
    assert warned in kept and not any(calm in t or headed in t for t in kept)
    assert any("lies beyond the error budgets" in text for text in kept)
    page = write(threshold, tmp_path, "--page-group-size", "4")
    assert f"<h2>{headed}</h2>" in page and calm not in page and warned not in page
    assert "<h1>org/tiny</h1>" in page and "<title>org/tiny: " in page


def test_a_large_model_stays_small(make_profile, tmp_path):
    import numpy as np

    random = np.random.default_rng(0)
    model = replace(make_profile().model, num_layers=64, num_kv_heads=8, num_query_heads=64)
    share = random.random((3, 50, 64, 8))
    curve = np.sort(random.random((50, 64, 8, 4)))
    profile = make_profile(
        model=model,
        data={"n_samples": 50},
        arrays={
            "threshold_share/crosslayer": share,
            "threshold_share/perlayer": share,
            "mass_curve": curve,
            "error_curve": curve[..., ::-1],
        },
    )
    assert len(write(profile, tmp_path).encode()) < 1_500_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ratios", "0.5,2"), "expected ratios above 0 and at most 1"),
        (("--ratios", ",".join(str(n / 100) for n in range(10, 90, 5))), "at most 12"),
        (("--ratios", "half"), "expected ratios above 0 and at most 1"),
        (("--page-group-size", "3"), "--page-group-size is 3"),
        (("--out", "/nowhere/page.html"), "--out /nowhere/page.html cannot be written"),
        (("--out", "."), "--out . cannot be written: it is a folder"),
    ],
)
def test_mistakes_are_told(make_profile, tmp_path, capsys, arguments, words):
    source = tmp_path / "tiny.profile"
    make_profile().save(source)
    command = ["report", str(source), "--out", str(tmp_path / "page.html"), *arguments]
    assert cli.main(command) == 2
    assert words in capsys.readouterr().err


def test_the_profile_is_never_written_over(make_profile, tmp_path, capsys):
    source = tmp_path / "tiny.profile"
    make_profile().save(source)
    before = source.read_bytes()
    assert cli.main(["report", str(source), "--out", str(source)]) == 2
    assert "it is what is read" in capsys.readouterr().err
    assert source.read_bytes() == before


def test_a_missing_profile_is_told(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none.profile")]) == 2
    assert "no readable profile" in capsys.readouterr().err


def test_the_bundled_profile_can_be_reported(tmp_path):
    from tangram.bundled import recall_model_path

    try:
        source = recall_model_path() / "expected_attention.profile"
    except FileNotFoundError:
        pytest.skip("models/recall holds no weights; models/recall/train.py makes them")
    page = write(Profile.load(source), tmp_path, "--page-group-size", "1")
    assert "Qwen3ForCausalLM" in page
