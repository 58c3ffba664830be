"""The folder of a run: no other module knows the names in it. Each write is whole or absent.

    outputs/<run>/
        arguments.yaml         all arguments, in the form that --config reads
        skipped_rows.json      rows that `skip_bad_rows` passed over, and why
        begun_with.json        where the command ran, so that relative paths are found again from anywhere
        progress.json          how far it is, and its attempts: for status.py and for restarts
        checkpoint-<step>/     with copies of arguments.yaml and progress.json
        unfinished/            a checkpoint that is being written
        trainer_state.json     what was logged; metrics.json: written last, says `completed`
        wandb_run_id.txt       one W&B run for all attempts; runs/ and wandb/ are the trackers' own
        README.md              the card, written again with each evaluation
    count_calibration.json how counts are read from the model's distribution, as the last evaluation found it
    evaluation/<name>/     see `EvaluationFolder`; report.html is the last evaluation's page
    outputs/<run>.previous-<n>/  a completed run that was trained anew

`progress.json` is {"step", "max_steps", "logged_at", "seconds_per_step", "loss", ..., "attempts": [{"started", "from_step",
"host", "process", "job", "restart", "nodes"; once it has ended in order: "ended", "step", "reason"}, ...]}.

Standard library only at import: status.py answers at once. Only the main process writes.
"""

import datetime
import hashlib
import json
import os
import shutil
import socket
import sys
import zlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetuning.failures import writing
from finetuning.flags import nearest_path

ARGUMENTS = "arguments.yaml"
BEGUN_WITH = "begun_with.json"
PROGRESS = "progress.json"
METRICS = "metrics.json"
TRAINER_STATE = "trainer_state.json"
WANDB_ID = "wandb_run_id.txt"
CHECKPOINT = "checkpoint-"  # and the step
UNFINISHED = "unfinished"
TENSORBOARD = "runs"
EVALUATION = "evaluation"
REPORT = "report.html"
CARD = "README.md"
SKIPPED_ROWS = "skipped_rows.json"
INT8_PRODUCTS = "int8_products.json"
CHECKSUM = "crc32"  # of the other values
COUNTS = "count_calibration.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Kept in each checkpoint, so that a damaged file of the run can be read there.
COPIED = (ARGUMENTS, PROGRESS)
# Not part of the trained adapter, nor of its description.
BOOKKEEPING = (COUNTS, SKIPPED_ROWS, BEGUN_WITH, PROGRESS, TRAINER_STATE, WANDB_ID)
# Of a finished run what is written again: by a damaged-file rule, by an evaluation.
CHANGING = (CARD, METRICS, PROGRESS, REPORT, WANDB_ID, "manifest.json")


# Writing and reading


def write_atomically(path: Path, content: str | bytes, *, to_disk: bool = True) -> None:
    """Write a file whole or not at all: to a name beside it, then into its place.

    `to_disk` waits for the disk in between: without it a machine that loses power may keep an empty file.
    """
    unfinished = path.with_name(f"{path.name}.unfinished")
    with writing(path):
        try:
            with unfinished.open("wb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                if to_disk:
                    file.flush()
                    os.fsync(file.fileno())
            unfinished.replace(path)
        except OSError:
            with suppress(OSError):
                unfinished.unlink()
            raise


def write_json(path: Path, values: Any, *, to_disk: bool = True) -> None:
    """`write_atomically` of an object as indented JSON."""
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", to_disk=to_disk)


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file. Raises ValueError, with the remedy, for a damaged one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({'empty' if not path.stat().st_size else error}). {remedy}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: damaged (expected an object, found {type(values).__name__}). {remedy}")
    return values


def write_checked(path: Path, values: dict[str, Any]) -> None:
    """`write_json` with a checksum of the values beside them."""
    values = json.loads(json.dumps(values))
    write_json(path, values | {CHECKSUM: _checksum(values)})


def read_checked(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_checked` wrote. Raises ValueError, with the remedy, where one character of it changed."""
    values = read_json(path, remedy)
    if values.pop(CHECKSUM, None) not in (None, _checksum(values)):
        raise ValueError(f"{path}: damaged (changed since it was written). {remedy}")
    return values


def set_aside(folder: Path) -> Path:
    """Rename a finished folder to `<name>.previous-<n>`, the first free n, and return its new path."""
    number = 1
    while (kept := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    return folder.rename(kept)


def changed_settings(before: dict[str, Any], now: dict[str, Any], may_change: Collection[str] = ()) -> list[str]:
    """`key: old -> new` of each setting that differs, in the order of their names, but for those in `may_change`."""
    return [
        f"{key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if key not in may_change and before.get(key) != now.get(key)
    ]


# Arguments, and where they were given


def write_arguments(folder: Path, arguments: dict[str, Any]) -> None:
    """`arguments.yaml`, between YAML's marks of a document's start and end: a file that was cut off lacks the second."""
    import yaml

    text = yaml.safe_dump(arguments, allow_unicode=True, sort_keys=True, explicit_start=True, explicit_end=True)
    write_atomically(folder / ARGUMENTS, text)


def read_arguments(folder: Path) -> dict[str, Any] | None:
    """The arguments of a run, given its folder or one of its checkpoints; None where no run of this project wrote any.

    A damaged file is read from the newest checkpoint's copy. Raises ValueError where none has a copy.
    """
    for place in (folder, folder.parent):
        if not (place / ARGUMENTS).is_file():
            continue
        try:
            return _parse_arguments(place / ARGUMENTS)
        except ValueError as error:
            for checkpoint in reversed(checkpoints(place).values()):
                try:
                    arguments = _parse_arguments(checkpoint / ARGUMENTS)
                except (OSError, ValueError):
                    continue  # an older checkpoint may have it
                _tell_of_copy(error, checkpoint)
                return arguments
            raise ValueError(
                f"{error}, and no checkpoint has a copy. Delete this file: the command that began the run writes it again"
            ) from error
    return None


def _parse_arguments(path: Path) -> dict[str, Any]:
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        arguments = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: damaged ({str(error).splitlines()[0]})") from error
    if not isinstance(arguments, dict) or (text.startswith("---") and not text.endswith("...\n")):
        raise ValueError(f"{path}: damaged ({'cut off' if text else 'empty'})")
    return arguments


def _tell_of_copy(error: ValueError, checkpoint: Path) -> None:
    print(f"{str(error).partition('. ')[0]}: read from the copy in {checkpoint.name}", file=sys.stderr)


def change_arguments(folder: Path, **values: Any) -> None:
    """Note in `arguments.yaml` what a run has decided for itself; nothing where there is none."""
    if (folder / ARGUMENTS).is_file():
        write_arguments(folder, (read_arguments(folder) or {}) | values)


def write_begun_with(folder: Path, facts: dict[str, Any] | None = None) -> None:
    """Note where the command ran and where its folder was, and other `facts` of the start."""
    write_checked(folder / BEGUN_WITH, {"directory": os.getcwd(), "folder": os.path.abspath(folder), **(facts or {})})


def read_begun_with(folder: Path) -> dict[str, Any]:
    """`begun_with.json` of a run's folder or of one of its checkpoints; empty for runs that wrote none."""
    place = next((place for place in (folder, folder.parent) if (place / BEGUN_WITH).is_file()), folder)
    return read_checked(place / BEGUN_WITH, "Delete it: paths are then looked for from the current directory")


def write_skipped_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Note which rows a training passed over, and why."""
    write_json(folder / SKIPPED_ROWS, {"rows": list(rows)})


def write_int8_products(folder: Path, choice: dict[str, Any]) -> None:
    """Note which products of the base stay in 16 bits under `base_precision: int8`, and what the others cost."""
    write_checked(folder / INT8_PRODUCTS, choice)


def read_int8_products(folder: Path) -> dict[str, Any] | None:
    """What a run, of which `folder` may be a checkpoint, noted of them; None where it noted nothing."""
    place = next((place for place in (folder, folder.parent) if (place / INT8_PRODUCTS).is_file()), None)
    return None if place is None else read_checked(place / INT8_PRODUCTS, "Delete it: they are then chosen anew")


def find_again(folder: Path, name: str) -> str:
    """A folder that the run's arguments name, from any working directory, also after both were moved together.

    Looked for where it lies relative to the run, then where it was when the run began, then from here. A name that is
    found nowhere is one of the Hub, and stays as it is.
    """
    begun, candidates = read_begun_with(folder), [Path(name)]
    if begun:
        was = Path(begun["directory"], name)
        run = folder if (folder / BEGUN_WITH).is_file() else folder.parent
        candidates = [run / os.path.relpath(was, begun["folder"]), was, *candidates]
    found = next((path for path in candidates if path.is_dir()), None)
    if found is None or (Path(name).is_dir() and found.samefile(name)):
        return name
    return os.path.normpath(found)


def adapter_base(folder: Path) -> str | None:
    """The base model of the adapter in a folder, as `find_again` finds it; None where no adapter is.

    Raises ValueError for a damaged `adapter_config.json`.
    """
    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    config = read_json(folder / ADAPTER_CONFIG, "Use a whole checkpoint of this run in its place")
    if "base_model_name_or_path" not in config:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG}: names no base_model_name_or_path: use the folder that training wrote"
        )
    return find_again(folder, config["base_model_name_or_path"])


def untuned_model(folder: Path) -> str:
    """What a run began with: its adapter's base, or for a run trained in full the model that its arguments name."""
    return adapter_base(folder) or find_again(folder, (read_arguments(folder) or {})["model_name_or_path"])


# Progress and the end


def now() -> str:
    """This moment in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read_progress(folder: Path) -> dict[str, Any]:
    """`progress.json` of a run's folder; empty where training has not begun. Damaged, the newest checkpoint's copy."""
    remedy = "No checkpoint has a copy; delete it, and the same command begins a new count of attempts"
    try:
        return read_json(folder / PROGRESS, remedy)
    except ValueError as error:
        for checkpoint in reversed(checkpoints(folder).values()):
            try:
                copy = read_json(checkpoint / PROGRESS, remedy)
            except ValueError:
                continue  # an older checkpoint may have it
            if copy:
                _tell_of_copy(error, checkpoint)
                return copy
        raise


def write_progress(folder: Path, progress: dict[str, Any]) -> None:
    """Every few steps: no step waits for the disk, since each checkpoint has a copy."""
    write_json(folder / PROGRESS, progress, to_disk=False)


def this_job() -> dict[str, Any]:
    """Where this process runs: host and process, and job, restart and nodes under Slurm."""
    place: dict[str, Any] = {"host": socket.gethostname(), "process": os.getpid()}
    if job := os.environ.get("SLURM_JOB_ID"):
        place |= {
            "job": job,
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "nodes": os.environ.get("SLURM_JOB_NODELIST", ""),
        }
    return place


def begin_attempt(folder: Path, from_step: int) -> None:
    """Note in `progress.json` that a training starts at a step; what was known of a fresh start's folder is dropped."""
    before = read_progress(folder)
    progress = before if from_step else {}
    progress["attempts"] = [*before.get("attempts", []), {"started": now(), "from_step": from_step, **this_job()}]
    write_progress(folder, progress)


def end_attempt(folder: Path, step: int, reason: str) -> None:
    """Note in `progress.json` where and why the last attempt ended in order."""
    progress = read_progress(folder)
    progress["step"] = step
    progress["attempts"][-1] |= {"ended": now(), "step": step, "reason": reason}
    write_progress(folder, progress)


def read_metrics(folder: Path) -> dict[str, Any]:
    """`metrics.json` of a run; empty when training has not ended. Damaged, what `trainer_state.json` says of the end.

    Raises ValueError where that file does not tell of an end either.
    """
    remedy = "The command that began the run continues from its last checkpoint, and writes it again"
    try:
        return read_checked(folder / METRICS, remedy)
    except ValueError:
        try:
            state = read_json(folder / TRAINER_STATE, remedy)
        except ValueError:
            state = {}
        if any("train_runtime" in entry for entry in state.get("log_history", [])):
            kept = state.get("best_global_step") if state.get("best_model_checkpoint") else None
            return final_metrics(state["log_history"], state["global_step"], kept)
        raise


def final_metrics(
    log_history: Sequence[dict[str, Any]], global_step: int, kept_step: int | None = None
) -> dict[str, Any]:
    """What a finished run leaves in `metrics.json`: its training's numbers, and those of the evaluation of its weights.

    These are the last step's, or those of `kept_step` where a run kept its best checkpoint.
    """
    metrics: dict[str, Any] = {}
    for entry in log_history:
        if "train_runtime" in entry:
            metrics |= {key: value for key, value in entry.items() if key != "step"}
    for entry in log_history:  # the last evaluation wins
        if kept_step is None or entry["step"] == kept_step:
            metrics |= {key: value for key, value in entry.items() if key.startswith("eval_")}
    if kept_step is not None:
        metrics["kept_step"] = kept_step
    return metrics | {"global_step": global_step, "completed": True}


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """The last file of a run: that it is there says that the run is complete."""
    write_checked(folder / METRICS, metrics)


def read_log_history(folder: Path) -> list[dict[str, Any]]:
    """What training logged, step by step; empty when nothing tells. Damaged, the newest checkpoint's."""
    for place in (folder, *reversed(checkpoints(folder).values())):
        try:
            if state := read_json(place / TRAINER_STATE, ""):
                return state["log_history"]
        except ValueError:
            continue  # an older one may be whole
    return []


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> folder of each checkpoint in place, the oldest first; whole or not."""
    steps = {
        int(number): path
        for path in folder.glob(f"{CHECKPOINT}*")
        if (number := path.name.removeprefix(CHECKPOINT)).isdigit() and path.is_dir()
    }
    return dict(sorted(steps.items()))


def copy_into_checkpoint(folder: Path, checkpoint: Path) -> None:
    """Copies of the run's small files, before the checkpoint gets its place."""
    for name in COPIED:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, checkpoint / name)


def files_of_result(folder: Path) -> list[Path]:
    """What a finished run consists of, and what its manifest describes: weights, processor, arguments, state."""
    return [path for path in folder.iterdir() if path.is_file() and path.name not in CHANGING]


def open_run(name: str) -> tuple[Path, dict[str, Any]]:
    """Folder and arguments of a completed run. ValueError when training has not ended there."""
    run = Path(name)
    if not read_metrics(run).get("completed"):
        begun = (run / ARGUMENTS).is_file()
        state = "training has not ended here; the command that began it continues it" if begun else "no run here"
        raise ValueError(
            f"{name}: {state}{nearest_path(run) or '.'} Expected a folder such as outputs/llava-sample that training wrote"
        )
    arguments = read_arguments(run)
    if arguments is None:
        raise ValueError(f"{name}: {ARGUMENTS} is missing; use the folder as training wrote it")
    return run, arguments


def is_unfinished(folder: Path) -> bool:
    """Whether a training began here and has not ended: weights that lie here may be half written."""
    return (folder / ARGUMENTS).is_file() and not (folder / "manifest.json").is_file() and not read_metrics(folder)


def refuse_unfinished(folder: Path) -> None:
    """Raise ValueError for a model in a run's folder that is still being trained."""
    if is_unfinished(folder):
        raise ValueError(f"{folder}: training has not ended here; its checkpoints can be asked, such as the newest")


def digest_weights(run: Path) -> str:
    """SHA-256 over the run's weight files, so that another training in the same folder is another run."""
    whole = hashlib.sha256()
    for path in sorted(run.glob("*.safetensors")):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def wandb_id(folder: Path, new: str) -> str:
    """The id of the W&B run that all attempts share: the one that is kept, or `new`, which is kept from now on."""
    path = folder / WANDB_ID
    kept = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not kept:
        write_atomically(path, new + "\n")
    return kept or new


# Evaluations


class EvaluationFolder:
    """`outputs/<run>/evaluation/<name>/`: answers as they come, then tables, and metrics.json last: it says `whole`.

    answers.unfinished.jsonl starts with {"settings": ...}; each line after it is {"row": n, "<model>": answer, "crc32"}.
    """

    def __init__(self, run: Path, name: str):
        self.folder = run / EVALUATION / name
        self.metrics_file = self.folder / METRICS
        self.answers_file = self.folder / "answers.jsonl"
        self.counts_file = self.folder / "counts.jsonl"
        self.table_file = self.folder / "table.md"
        self.unfinished_file = self.folder / "answers.unfinished.jsonl"
        self.page = self.folder / REPORT
        self.page_of_run = run / REPORT

    def metrics(self) -> dict[str, Any]:
        """Of a finished evaluation; empty where it has not ended. Raises ValueError for a damaged file."""
        return read_json(self.metrics_file, "--overwrite evaluates anew; the damaged evaluation is kept beside it")

    def settings(self) -> dict[str, Any] | None:
        """What the evaluation that is here, finished or not, was begun with; None where there is none."""
        if metrics := self.metrics():
            return metrics["settings"]
        entries = self._kept_lines()
        return entries[0]["settings"] if entries else None

    def begin(self, settings: dict[str, Any]) -> None:
        """Make the folder of a new evaluation."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.unfinished_file, _json_lines([{"settings": settings}]))

    def keep(self, model: str, first_row: int, answers: Sequence[str]) -> None:
        """Add a model's answers to the rows from `first_row` on. The file is replaced at once: a kill halves no line."""
        before = self.unfinished_file.read_text(encoding="utf-8")
        lines = [{"row": first_row + number, model: answer} for number, answer in enumerate(answers)]
        lines = [line | {CHECKSUM: _checksum(line)} for line in lines]
        write_atomically(self.unfinished_file, before + _json_lines(lines))

    def kept(self, models: Sequence[str]) -> dict[str, list[str]]:
        """Answers of each model so far, in the order of the rows. Raises ValueError where a row was answered twice."""
        answers: dict[str, list[str]] = {model: [] for model in models}
        for entry in self._kept_lines()[1:]:
            row = entry.pop("row", None)  # evaluations of older versions number no rows
            for model, answer in entry.items():
                if row is not None and row != len(answers[model]):
                    raise ValueError(
                        f"{self.unfinished_file}: expected the {model} model's answer to row {len(answers[model])}, found "
                        f"row {row}: two evaluations wrote here. --overwrite evaluates anew; this one is kept beside it"
                    )
                answers[model].append(answer)
        return answers

    def finish(self, metrics: dict[str, Any], answers: Sequence[dict[str, Any]], tables: str) -> None:
        """Write answers.jsonl, table.md and, last, metrics.json."""
        write_atomically(self.answers_file, _json_lines(answers))
        write_atomically(self.table_file, tables)
        write_json(self.metrics_file, metrics)
        self.unfinished_file.unlink(missing_ok=True)

    def write_counts(self, lines: Sequence[dict[str, Any]]) -> None:
        """Counts and intervals from the model's distribution, a line for each question."""
        write_atomically(self.counts_file, _json_lines(lines))

    def read_counts(self) -> list[dict[str, Any]]:
        """What `write_counts` wrote; empty where it wrote nothing."""
        if not self.counts_file.is_file():
            return []
        return [json.loads(line) for line in self.counts_file.read_text(encoding="utf-8").splitlines()]

    def _kept_lines(self) -> list[dict[str, Any]]:
        if not self.unfinished_file.is_file():
            return []
        try:
            entries = [json.loads(line) for line in self.unfinished_file.read_text(encoding="utf-8").splitlines()]
            for number, entry in enumerate(entries, start=1):
                if entry.pop(CHECKSUM, None) not in (None, _checksum(entry)):
                    raise ValueError(f"line {number} changed since it was written")
            return entries
        except (ValueError, AttributeError) as error:
            raise ValueError(
                f"{self.unfinished_file}: damaged ({error}). --overwrite evaluates anew; this one is kept beside it"
            ) from error


def write_count_settings(run: Path, settings: dict[str, Any]) -> None:
    """Forms of answers, candidates and calibration of a run's counts."""
    write_checked(run / COUNTS, settings)


def read_count_settings(run: Path) -> dict[str, Any]:
    """What `write_count_settings` wrote; empty where there is nothing. Raises ValueError for a damaged file."""
    return read_checked(run / COUNTS, "Evaluate the run again with --overwrite")


def evaluations(run: Path) -> list[Path]:
    """metrics.json of each finished evaluation of a run."""
    folder = run / EVALUATION
    return sorted([*folder.glob(f"*/{METRICS}"), *folder.glob(f"*/*/{METRICS}")])


def _checksum(entry: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(entry).encode())


def _json_lines(entries: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
