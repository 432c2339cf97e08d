import doctest
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "budgets.md"


def test_the_page_is_right():
    result = doctest.testfile(str(PAGE), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0
