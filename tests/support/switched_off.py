"""Parts of `finetuning.upstream` switched off: the libraries' own code in their place."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from finetuning import upstream
from finetuning.upstream import ENTRIES, TESTED, Entry


def word_of(entry: Entry) -> str:
    """What an entry is called here, such as `Trainer.log` or `stage3.is_invalid_grad_norm`."""
    return f"{entry.owner.rpartition('.')[2]}.{entry.name}"


def entries_of(words: tuple[str, ...]) -> list[Entry]:
    """The entries of these words: `Trainer.log`, or `log` for those of all owners."""
    found = [entry for entry in ENTRIES if {entry.name, word_of(entry)} & set(words)]
    unknown = set(words) - {word for entry in found for word in (entry.name, word_of(entry))}
    assert not unknown, f"upstream.ENTRIES has no {unknown}"
    return found


@contextmanager
def without(*words: str) -> Iterator[None]:
    """Inside, what `upstream` replaces or overrides by these words is as the libraries have it."""
    off = entries_of(words)
    replace, set_read, overrides = upstream.replace, upstream.set_read, upstream.overrides
    with pytest.MonkeyPatch.context() as patch:

        def replace_others(owner: Any, name: str, new: Any) -> Any:
            return getattr(owner, name, None) if upstream.entry_of(owner, name) in off else replace(owner, name, new)

        def set_others(thing: Any, owner: str, name: str, value: Any) -> None:
            if not any(entry[:2] == (owner, name) for entry in off):
                set_read(thing, owner, name, value)

        def restore(cls: type) -> type:
            bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] in TESTED]
            ours = {name for base in cls.__mro__ if base.__module__.startswith("finetuning.") for name in vars(base)}
            for entry in off:
                # A module of ours has a forward of its own: what is replaced of Module is replaced in instances.
                if (
                    entry.name in ours
                    and entry.owner != upstream.MODULE
                    and entry.owner in map(upstream.path_of, bases)
                ):
                    theirs = next(vars(base)[entry.name] for base in bases if entry.name in vars(base))
                    patch.setattr(cls, entry.name, theirs)
            return cls

        patch.setattr(upstream, "replace", replace_others)
        patch.setattr(upstream, "set_read", set_others)
        patch.setattr(upstream, "overrides", lambda cls: restore(overrides(cls)))
        for cls in overriding_classes():
            restore(cls)
        yield


def overriding_classes() -> list[type]:
    """Classes of ours that inherit from libraries, of the modules that are imported."""
    modules = [module for name, module in sys.modules.items() if name.startswith("finetuning.")]
    classes = {thing for module in modules for thing in vars(module).values() if isinstance(thing, type)}
    return [cls for cls in classes if cls.__module__.startswith("finetuning.")]
