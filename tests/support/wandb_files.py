"""Reading back what W&B wrote offline: its records are protobufs of the library, in LevelDB's log format."""

import json
import struct
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK = 32768


def records(path: Path) -> list[Record]:
    """All records of a run-*.wandb file. A record's parts (full, first, middle, last: 1 to 4) never cross a block."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    found, parts, position = [], b"", 7
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        parts = (b"" if kind in (1, 2) else parts) + data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(Record.FromString(parts))
    return found


def read_attempts(run: Path) -> list[dict[str, Any]]:
    """What each attempt of a training told W&B, oldest first: id, group, tags, config, history, summary, exit code."""
    attempts = []
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        attempt: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "exit_code": None, "preempting": False}
        for record in records(path):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                attempt |= {"id": record.run.run_id, "group": record.run.run_group, "tags": list(record.run.tags)}
                attempt["config"] |= items(record.run.config.update)
            elif kind == "config":
                attempt["config"] |= items(record.config.update)
            elif kind == "history":
                attempt["history"].append(items(record.history.item))
            elif kind == "summary":
                attempt["summary"] |= items(record.summary.update)
            elif kind == "exit":
                attempt["exit_code"] = record.exit.exit_code
            elif kind == "preempting":
                attempt["preempting"] = True
        attempts.append(attempt)
    return attempts


def items(entries: Any) -> dict[str, Any]:
    return {entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries}
