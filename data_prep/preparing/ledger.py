"""What became of every item that was read: accepted, or rejected with a reason that a person can act on."""

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from finetuning.failures import harmless


class Reject(NamedTuple):
    file: str
    line: int | None  # 1-based line of a text file where the item starts; None when the file itself is the item
    reason: str  # short code, e.g. "corrupt_image"
    detail: str  # one sentence: what was given, what was expected


@dataclass
class Ledger:
    """Counts items by kind ("frames", "labels", "dialogues", "rows") and holds every reject.

    Each item read must end in exactly one `accept` or one `reject`; `check` asserts that the sums agree.
    """

    num_read: Counter[str] = field(default_factory=Counter)
    num_accepted: Counter[str] = field(default_factory=Counter)
    num_rejected: Counter[str] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)

    def read(self, kind: str, number: int = 1) -> None:
        """Count items of a kind as read."""
        self.num_read[kind] += number

    def accept(self, kind: str, number: int = 1) -> None:
        """Count items of a kind as accepted."""
        self.num_accepted[kind] += number

    def reject(self, kind: str, file: str | Path, line: int | None, reason: str, detail: str) -> None:
        """Count an item as rejected, and note where it stood and why."""
        self.num_rejected[kind] += 1
        self.rejects.append(Reject(str(file), line, reason, detail))

    def check(self) -> None:
        """Raise AssertionError unless what was read is what was accepted and rejected."""
        for kind, num_read in self.num_read.items():
            num_accepted, num_rejected = self.num_accepted[kind], self.num_rejected[kind]
            assert num_accepted + num_rejected == num_read, f"{kind}: {num_accepted} + {num_rejected} != {num_read}"

    def counts(self) -> dict[str, dict[str, int]]:
        """`{kind: {"read": n, "accepted": n, "rejected": n}}`, in the order in which the kinds were first read."""
        return {
            kind: {"read": number, "accepted": self.num_accepted[kind], "rejected": self.num_rejected[kind]}
            for kind, number in self.num_read.items()
        }

    def reasons(self) -> Counter[str]:
        """How often each reason of rejection occurs."""
        return Counter(reject.reason for reject in self.rejects)

    def table(self) -> str:
        """The counts by kind, then each reject reason with its number and first example."""
        lines = [f"{'':12}{'read':>9}{'accepted':>10}{'rejected':>10}"]
        for kind, count in self.counts().items():
            lines.append(f"{kind:12}{count['read']:>9,}{count['accepted']:>10,}{count['rejected']:>10,}")
        for reason, number in self.reasons().most_common():
            first = next(reject for reject in self.rejects if reject.reason == reason)
            where = first.file if first.line is None else f"{first.file}:{first.line}"
            lines.append(f"  {reason} x {number:,}, first: {where}: {first.detail}")
        return harmless("\n".join(lines))

    def write_csv(self, path: Path) -> None:
        """Columns file, line, reason, detail; UTF-8 with BOM, so that Excel shows Hangul as it is."""
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Reject._fields)
            writer.writerows([as_cell(value) for value in reject] for reject in self.rejects)


def as_cell(value: str | int | None) -> str | int | None:
    """A cell that Excel shows and does not compute: what begins as a formula gets an apostrophe (OWASP, CSV injection)."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
