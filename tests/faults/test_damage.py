"""Every file of a run, a checkpoint and a dataset is damaged: what is used then is whole, or the file is named."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import must_run, run_here
from datasets import DatasetDict

from finetuning import run_folder
from finetuning.data.dataset import open_dataset, unreadable_files
from finetuning.manifest import MANIFEST, manifest_problems
from finetuning.models.processing import load_config
from finetuning.run_folder import CHANGING, COUNTS, METRICS, PROGRESS, EvaluationFolder
from finetuning.training.checkpoints import last_whole_checkpoint
from finetuning.training.origin import of_base, refuse_changed_run
from support.damage import all_files, damaged, damages
from support.training import train

# Said as it was read, or read from elsewhere: the run goes on as if nothing had been.
REBUILT = (METRICS, PROGRESS)


# The rate stays as it is, so that a step too many would show.
FLAGS = [
    "--save_strategy",
    "steps",
    "--save_steps",
    "2",
    "--load_best_model_at_end",
    "false",
    "--lr_scheduler_type",
    "constant",
]


@pytest.fixture(scope="module")
def run(tiny_llava, cctv_dataset, tmp_path_factory) -> Path:
    """A finished run with checkpoints of steps 2 and 4, and an evaluation."""
    folder = tmp_path_factory.mktemp("damage") / "run"
    train(tiny_llava, cctv_dataset, folder, *FLAGS)
    must_run("scripts/evaluate_llava.py", "--run", folder, "--limit", "4")
    return folder


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run, capsys):
    newest, before = run / "checkpoint-4", run / "checkpoint-2"
    files = all_files(newest)
    assert len(files) > 10 and last_whole_checkpoint(run) == newest
    for path in files:
        for what, contents in damages(path):
            with damaged(path, contents):
                found = last_whole_checkpoint(run)
            said = capsys.readouterr().out
            name = str(path.relative_to(newest))
            if path.name == MANIFEST and contents is None:  # as an older version left it: nothing else is wrong
                assert found == newest
            else:
                assert found == before and f"{newest}: {name}" in said, (name, what, said)
    assert last_whole_checkpoint(run) == newest


def test_where_no_checkpoint_is_whole_the_run_is_not_begun_anew_in_silence(run):
    kept = [run / f"checkpoint-{step}" / "adapter_model.safetensors" for step in (2, 4)]
    with (
        damaged(kept[0], b""),
        damaged(kept[1], None),
        pytest.raises(ValueError, match="no checkpoint of this run") as error,
    ):
        last_whole_checkpoint(run)
    assert "checkpoint-4: adapter_model.safetensors: missing" in str(error.value)
    assert "checkpoint-2: adapter_model.safetensors: 0 bytes" in str(error.value)


def test_a_run_that_was_killed_behind_its_last_checkpoint_trains_no_further_step(
    run, tiny_llava, cctv_dataset, tmp_path
):
    again = shutil.copytree(run, tmp_path / "run")
    (again / METRICS).unlink()
    (again / "adapter_model.safetensors").write_bytes(b"half")
    train(tiny_llava, cctv_dataset, again, *FLAGS)
    weights = [folder / "adapter_model.safetensors" for folder in (run, again)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    ends = [run_folder.read_metrics(folder) for folder in (run, again)]
    assert [end["global_step"] for end in ends] == [4, 4]
    assert ends[0]["train_loss"] == pytest.approx(ends[1]["train_loss"], rel=1e-6)


def test_a_damaged_run_is_refused_by_the_name_of_its_file_or_rebuilt(run, tiny_llava, cctv_dataset):
    arguments, metrics = run_folder.read_arguments(run), run_folder.read_metrics(run)
    counts = run_folder.read_count_settings(run)

    def use() -> list[str]:
        _, read = run_folder.open_run(str(run))
        run_folder.read_progress(run)
        changes = refuse_changed_run(run, str(tiny_llava), str(cctv_dataset), accept_changes=False)
        assert read == arguments
        assert run_folder.read_metrics(run) | metrics == run_folder.read_metrics(run)
        assert run_folder.read_count_settings(run) in ({}, counts)
        return changes

    assert use() == []
    described = json.loads((run / MANIFEST).read_text())["files"]
    for path in [path for path in run.iterdir() if path.is_file()]:
        assert path.name in described or path.name in (*CHANGING, COUNTS), path.name
        for what, contents in damages(path):
            with damaged(path, contents):
                if path.name in described or (path.name == MANIFEST and contents is not None):
                    with pytest.raises(ValueError, match=path.name):
                        use()
                elif path.name in (*REBUILT, COUNTS):
                    use_or_name(use, path, what)
                else:
                    assert use() == [], (path.name, what)


def use_or_name(use, path: Path, what: str) -> None:
    """A small file is rebuilt, or refused by its name."""
    try:
        use()
    except ValueError as error:
        assert path.name in str(error) or "training has not ended" in str(error), (path.name, what, error)
    except AssertionError:
        # One digit of a number for people: the file has no hash, since each log changes it.
        assert path.name == PROGRESS and what.startswith("bit"), (path.name, what)


def test_a_changed_run_can_be_used_when_that_is_accepted_and_it_is_noted(run, tiny_llava, raw_cctv, tmp_path):
    path = tiny_llava / "generation_config.json"
    with damaged(path, path.read_bytes() + b"\n"):
        assert of_base(str(tiny_llava), load_config(str(tiny_llava)))
        with pytest.raises(ValueError, match=r"the files of --model_name_or_path.*--accept_changes"):
            refuse_changed_run(run, str(tiny_llava), None, accept_changes=False)
        changes = refuse_changed_run(run, str(tiny_llava), None, accept_changes=True)
        ask = ["--model", run, "--image", raw_cctv / "frames" / "seq_000001.jpg", "--question", "How many?"]
        ask += ["--max_new_tokens", "4", "--output", tmp_path / "answers.jsonl"]
        refused = run_here("scripts/generate.py", *ask)
        assert refused.returncode == 1 and f"{run}: {changes[0]}: not as it was left" in refused.stderr
        assert not list(tmp_path.iterdir())
        for _ in range(2):
            must_run("scripts/generate.py", *ask, "--accept_changes")
        assert json.loads((tmp_path / "answers.settings.json").read_text())["accepted_changes"] == changes
        must_run("scripts/evaluate_llava.py", "--run", run, "--limit", "2", "--overwrite", "--accept_changes")
    assert EvaluationFolder(run, "test").metrics()["settings"]["accepted_changes"] == changes
    shutil.rmtree(run / "evaluation" / "test")
    (run / "evaluation" / "test.previous-1").rename(run / "evaluation" / "test")


def test_a_damaged_evaluation_is_not_shown(run):
    folder = EvaluationFolder(run, "test").folder
    assert manifest_problems(folder) == []
    described = json.loads((folder / MANIFEST).read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*described, MANIFEST}
    for path in all_files(folder):
        for what, contents in damages(path, 3):
            if (path.name, contents) == (MANIFEST, None):
                continue
            with damaged(path, contents):
                assert any(path.name in problem for problem in manifest_problems(folder)), (path.name, what)


def test_an_answer_that_changed_on_disk_is_not_scored(tmp_path):
    folder = EvaluationFolder(tmp_path, "test")
    folder.begin({"limit": 3})
    folder.keep("tuned", 0, ["3 people.", "nobody", "한 명"])
    assert folder.kept(["tuned"]) == {"tuned": ["3 people.", "nobody", "한 명"]}
    text = folder.unfinished_file.read_text(encoding="utf-8")
    for old, new in (("3 people", "8 people"), ('"row": 2', '"row": 3'), ("nobody", "nobod")):
        folder.unfinished_file.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ValueError, match=r"answers\.unfinished\.jsonl.*--overwrite"):
            folder.kept(["tuned"])


def test_a_damaged_dataset_is_refused_by_the_name_of_its_file(cctv_dataset, tmp_path):
    folder = tmp_path / "cctv"  # tests before this one may have left caches beside the rows that all share
    shutil.copytree(cctv_dataset, folder, ignore=shutil.ignore_patterns("cache-*"))

    def rows() -> DatasetDict:
        return open_dataset(str(folder), vision=True)

    whole = {split: list(of_split) for split, of_split in rows().items()}
    assert not [path for path in all_files(folder) if path.name.startswith("cache-")]  # nothing is written there
    for path in all_files(folder):
        for what, contents in damages(path):
            name = str(path.relative_to(folder))
            with damaged(path, contents):
                if name == "rejects.csv" or (name == MANIFEST and contents is None):
                    assert {split: list(of_split) for split, of_split in rows().items()} == whole
                    continue
                with pytest.raises(ValueError, match=name):
                    print(what, rows())


def test_a_damaged_arrow_file_without_a_manifest_ends_a_child_at_most(cctv_dataset, tmp_path):
    folder = tmp_path / "cctv"
    shutil.copytree(cctv_dataset, folder)
    (folder / MANIFEST).unlink()
    whole, path = {split: list(rows) for split, rows in open_dataset(str(folder), vision=True).items()}, None
    (path,) = (folder / "train").glob("data-*.arrow")
    assert unreadable_files([path]) == []
    size = path.stat().st_size
    for place in (0, 100, size // 2, size - 20):
        with damaged(path, path.read_bytes()[:place]), pytest.raises(ValueError, match=r"data-00000-of-00001\.arrow"):
            open_dataset(str(folder), vision=True)
    assert {split: list(rows) for split, rows in open_dataset(str(folder), vision=True).items()} == whole
