"""Each change to another library is noticed when its name goes, and saves what it is there for."""

import pytest
from conftest import ROOT

from finetuning import upstream
from finetuning.upstream import ENTRIES, TESTED, Entry, UpstreamChanged

PINS = dict(line.split("==") for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines() if "==" in line)


class Library:
    """Stands for a class of a library."""

    def method(self, first, second=None, **kwargs):
        return "library"


@pytest.fixture
def entries(monkeypatch):
    """`entries(*names)`: upstream knows these of `Library` and of nothing else."""

    def of(*names: str, arguments: tuple[str, ...] = ()) -> None:
        owner = f"torch.{Library.__qualname__}"
        monkeypatch.setattr(Library, "__module__", "torch")
        monkeypatch.setattr(upstream, "ENTRIES", [Entry(owner, name, "a test", arguments) for name in names])

    return of


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.owner.rpartition('.')[2]}.{entry.name}")
def test_every_name_is_there_and_takes_what_was_tested(entry):
    upstream.check(entry, upstream.resolve(entry.owner))


def test_tested_versions_are_the_pinned_ones():
    assert {library: tested[0] for library, tested in TESTED.items()} == {name: PINS[name] for name in TESTED}


def test_replacing_returns_what_was_there(entries):
    entries("method", arguments=("first", "first, second, **kwargs"))
    instance = Library()
    assert upstream.replace(instance, "method", lambda first: "ours")(1) == "library"
    assert instance.method(1) == "ours"


def test_a_name_that_is_gone_is_an_error_that_names_both_versions(entries):
    entries("renamed")
    with pytest.raises(
        UpstreamChanged, match=rf"Library.renamed is gone. Installed is torch .*, tested was {TESTED['torch'][0]}"
    ):
        upstream.replace(Library(), "renamed", None)
    with pytest.raises(UpstreamChanged, match="is gone"):
        upstream.overrides(type("Ours", (Library,), {"renamed": lambda self: None}))


def test_other_arguments_are_an_error(entries):
    entries("method", arguments=("first, cache", "first"))
    with pytest.raises(
        UpstreamChanged, match=r"takes \(first, second, \*\*kwargs\), expected \(first, cache\) or \(first\)"
    ):
        upstream.overrides(type("Ours", (Library,), {"method": lambda self: None}))


def test_what_is_not_declared_is_an_error(entries):
    entries()
    with pytest.raises(TypeError, match="method is replaced: add it"):
        upstream.replace(Library(), "method", None)
    with pytest.raises(TypeError, match="overrides a library's method: add it"):
        upstream.overrides(type("Ours", (Library,), {"method": lambda self: None}))


def test_an_untested_version_is_said_once(monkeypatch, entries):
    entries("method")
    monkeypatch.setitem(TESTED, "torch", ["0.1"])
    upstream.warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match="tested was 0.1: pip install -r requirements.txt") as said:
        for _ in range(2):
            upstream.replace(Library(), "method", None)
    assert len(said) == 1
    upstream.warn_if_untested.cache_clear()
