"""Real text by name: where it is found, and the passages made of it."""

import gzip

import pytest

from benchmarks.accuracy.sources import RealUnits, documents, passages
from tangram.errors import ConfigurationError

LONG = "A sentence of a manual. Another sentence! " * 30


class First:
    """Draws the document of that number."""

    def __init__(self, number):
        self._number = number

    def randrange(self, stop):
        assert self._number < stop
        return self._number


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.rst").write_text(f"two {LONG}")
    (tmp_path / "one.md").write_text(f"one {LONG}")
    (tmp_path / "zipped.txt.gz").write_bytes(gzip.compress(f"zipped {LONG}".encode()))
    (tmp_path / "page.html").write_text(f"<p>{LONG}</p>")
    (tmp_path / "short.md").write_text("short")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG" * 400)
    (tmp_path / "broken.txt").write_bytes(b"\xff\xfe\xfa" * 400)
    return tmp_path


def test_files_of_a_folder_and_one_file(folder):
    found = documents(str(folder), "--filler")
    assert [d.name for d in found] == ["b/two.rst", "one.md", "page.html", "zipped.txt.gz"]
    assert found[2].text == LONG and found[3].text.startswith("zipped")
    assert [d.name for d in documents(str(folder / "one.md"), "--filler")] == ["one.md"]


@pytest.mark.parametrize("source", ["stdlib", "python-manual", "package:pytest"])
def test_what_is_installed(source):
    found = documents(source, "--filler")
    assert len(found) > 20 and len({d.name for d in found}) == len(found)


@pytest.mark.parametrize("source", ["no/such/path", "package:no-such-package-at-all"])
def test_what_is_not_there_is_named(source):
    with pytest.raises(ConfigurationError, match=source.removeprefix("package:")):
        documents(source, "--filler")


def test_a_source_without_text_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=f"--filler {tmp_path}: there is no text"):
        documents(str(tmp_path), "--filler")


def test_passages_are_of_documents_of_their_own(folder):
    made = passages("code", str(folder), list, 3, 1000)
    assert [len(p.tokens) for p in made] == [1000] * 3 and {p.begin for p in made} == {500}
    names = [name for p in made for name in p.name.split(", ")]
    assert len(set(names)) == len(names)
    assert made == passages("code", str(folder), list, 3, 1000)
    assert len({p.digest for p in made}) == 3


def test_a_repeated_passage_is_there_twice(folder):
    (passage,) = passages("repeated", str(folder), list, 1, 1000)
    assert passage.tokens[:500] == passage.tokens[500:] and passage.begin == 500


def test_too_little_text_is_told(folder):
    with pytest.raises(ConfigurationError, match="--texts-a-kind"):
        passages("code", str(folder), list, 9, 1000)


def test_filler_goes_through_the_documents_and_ends(folder):
    found = documents(str(folder), "--filler")
    units = RealUnits(found, First(1))
    assert units.first(2) == ["one A sentence of a manual.", "Another sentence!"]
    everything = units.first(10**6)
    assert everything[:2] == units.first(2)
    assert len(everything) == sum(d.text.count(".") + d.text.count("!") for d in found)
    assert everything[-60] == "two A sentence of a manual."
