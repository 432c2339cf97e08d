"""The report in a real browser: it draws, follows its controls, and asks nothing of the network."""

import numpy as np
import pytest

from tangram import cli
from tangram.profile import ModelIdentity, Profile

pytestmark = pytest.mark.browser

LAYERS, KV_HEADS, SAMPLES = 5, 8, 14
EVIL = "</script><script>window.broken = 1</script><img src='http://127.0.0.1:9/x.png'>"


def count(selector: str) -> str:
    return f"document.querySelectorAll({selector!r}).length"


def choose(name: str, value: object) -> str:
    return f"document.querySelector('input[name={name}][value=\"{value}\"]').click()"


def colours(chart: str) -> str:
    return f"[...document.querySelectorAll('#{chart} .cell')].map((c) => c.getAttribute('fill'))"


def text(selector: str) -> str:
    return f"document.querySelector({selector!r}).textContent"


@pytest.fixture(scope="module")
def profile() -> Profile:
    random = np.random.default_rng(0)
    need = random.uniform(0.1, 2, (LAYERS, KV_HEADS))
    noise = random.uniform(0.8, 1.2, (SAMPLES, LAYERS, KV_HEADS))
    share = np.stack([(ratio * need * noise).clip(0, 1) for ratio in (0.2, 0.5)])
    held = np.linspace(0, 1, 9) ** need[..., None] * np.ones((SAMPLES, 1, 1, 1))
    candidates = [
        {"name": f"rule {n} {EVIL}", "divergence": 0.1 * n, "checked": 0.1 * n} for n in (1, 2, 3)
    ]
    return Profile(
        model=ModelIdentity(EVIL, LAYERS, KV_HEADS, 16, 64, 512, 1000),
        scorer_name="key_diff",
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
        ratios=(0.2, 0.5),
        shares=tuple(np.linspace(0, 1, 9)),
        data={"n_samples": SAMPLES, "description": EVIL},
        extra={
            "sample_kinds": [EVIL] * SAMPLES,
            "measured": [{"ratio": 0.3, "log": {"origin": EVIL, "candidates": candidates}}],
        },
        arrays={
            "threshold_share/crosslayer": share,
            "threshold_share/perlayer": share,
            "mass_curve": held,
            "error_curve": 1 - held,
        },
    )


@pytest.fixture(scope="module")
def page(profile, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    profile.save(folder / "made.profile")
    target = folder / "report.html"
    assert cli.main(["report", str(folder / "made.profile"), "--out", str(target)]) == 0
    return target


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_the_page_draws_every_picture_and_asks_for_nothing(browse, page, width, dark):
    heads = LAYERS * KV_HEADS
    expected = {
        "#budgets .cell": heads,
        "#overflow .cell": heads,
        "#boxes .box": heads,
        "#boxes .budget": heads,
        "#ranks .dot": SAMPLES,
        "#short .bar": SAMPLES,
        "#mass .band": 3,
        "#error .line": 1,
        "#memory .line": 9,  # full KV and eight ratios
        "#measured .dot": 3,
        "#tiles .tile": 5,
        "svg[role=img][aria-label]": 9,
        "script, img, iframe, object, link": 3,  # the data, the script, the empty icon
    }
    scheme = "matchMedia('(prefers-color-scheme: dark)').matches"
    overflow = "document.documentElement.scrollWidth <= innerWidth"
    found = browse(
        page,
        *map(count, expected),
        scheme,
        overflow,
        "'broken' in window",
        width=width,
        dark=dark,
    )
    assert dict(zip(expected, found["results"], strict=False)) == expected
    assert found["results"][len(expected) :] == [dark, True, False]
    assert found["console"] == []
    assert found["requests"] == [page.as_uri()]


def test_the_controls_change_the_pictures(browse, page):
    found = browse(
        page,
        colours("budgets"),
        choose("level", "uniform"),
        colours("budgets"),
        choose("ratio", 7),
        colours("budgets"),
        text("#command"),
        text("#tiles"),
        choose("level", "perlayer"),
        "document.querySelector('input[name=scope]:checked').value",
        choose("level", "error"),
        colours("overflow"),
        choose("overflow", "rows"),
        colours("overflow"),
    )
    error, _, uniform, _, more, command, tiles, _, scope, _, often, _, rows = found["results"]
    assert len(set(error)) > 2 and len(set(uniform)) <= 2 and len(set(more)) == 1
    assert more != uniform and often != rows
    assert "--compression-level uniform --compression-ratio 0.75" in command
    assert "192 to 192" in tiles  # three quarters of 256 rows
    assert scope == "perlayer"
    assert found["console"] == []


def test_values_can_be_pointed_at_read_aloud_and_listed(browse, page):
    press = "new KeyboardEvent('keydown', {key: '%s'})"
    key = f"document.querySelector('#budgets .plot').dispatchEvent({press})"
    point = """(() => {
      const cell = document.querySelectorAll('#budgets .cell')[9].getBoundingClientRect();
      const at = {clientX: cell.x + 5, clientY: cell.y + 5};
      document.querySelector('#budgets .plot').dispatchEvent(new PointerEvent('pointermove', at));
      const tip = document.getElementById('tip');
      return [tip.hidden, tip.textContent];
    })()"""
    rows = "DATA.levels[state.level].rows[state.ratio]"
    found = browse(
        page,
        rows,
        point,
        key % "Home",
        key % "ArrowRight",
        text("#spoken"),
        "document.querySelector('#budgets details').open = true",
        "[...document.querySelectorAll('#budgets td')].map((cell) => +cell.textContent)",
    )
    budgets, (hidden, tip), _, _, spoken, _, cells = found["results"]
    assert not hidden and tip.startswith(f"Layer 1, head 1{budgets[9]} of 256 rows")
    assert spoken.startswith(f"Layer 0, head 1. {budgets[1]} of 256 rows")
    assert cells == budgets
    assert found["console"] == []


def test_a_profile_without_statistics_says_so(browse, profile, tmp_path):
    bare = Profile(
        model=profile.model,
        scorer_name="key_diff",
        chunk_size_tokens=256,
        window_size_tokens=32,
        n_sink_tokens=4,
    )
    bare.save(tmp_path / "bare.profile")
    target = tmp_path / "report.html"
    assert cli.main(["report", str(tmp_path / "bare.profile"), "--out", str(target)]) == 0
    found = browse(
        target,
        text("#boxes > p"),
        text("#mass > p"),
        count("#budgets .cell"),
        "document.getElementById('measured-section').hidden",
    )
    assert found["results"] == [
        "This profile has no threshold shares: nothing is known of single samples.",
        "This profile has no attention mass curves.",
        LAYERS * KV_HEADS,
        True,
    ]
    assert found["console"] == []
