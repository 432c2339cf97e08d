"""The examples of docs/geometry.md are true."""

import doctest
import re
from pathlib import Path

PAGE = Path(__file__).resolve().parents[3] / "docs" / "geometry.md"


def test_the_examples_of_the_page_are_true():
    text = PAGE.read_text()
    # A closing fence would be read as output; blank lines keep the line numbers right.
    examples = re.sub(r"^```.*$", "", text, flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(examples, {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) >= 20
    report: list[str] = []
    failed, attempted = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert failed == 0, "".join(report)
    assert attempted == len(test.examples)
