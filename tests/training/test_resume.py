"""Where a run starts and continues, and what of a launch does not fit what was begun."""

import shutil
from pathlib import Path

import pytest

from finetuning import run_folder
from finetuning.fingerprints import of_folder
from finetuning.folder_lock import give_back, lock_file
from finetuning.training.checkpoints import put_in_place
from finetuning.training.resume import continuation_problems, refuse_futile_restart, start_or_continue
from support.checkpoints import write_checkpoint
from support.launches import launch_by

ALL_FULL = {"language_model": "full", "projector": "full"}


def test_a_job_that_was_queued_again_twice_without_a_step_stops_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run_folder.begin_attempt(tmp_path, 40)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    refuse_futile_restart(tmp_path, 40)
    run_folder.begin_attempt(tmp_path, 40)
    run_folder.end_attempt(tmp_path, 40, "SIGUSR2")
    refuse_futile_restart(tmp_path, 41)  # one step further: goes on
    message = r"job 77 began twice at step 40 and got no further \(killed without a word; then SIGUSR2\)"
    with pytest.raises(ValueError, match=message):
        refuse_futile_restart(tmp_path, 40)
    monkeypatch.setenv("SLURM_JOB_ID", "78")  # submitted anew
    refuse_futile_restart(tmp_path, 40)


SHARDED = ["latest", "rng_state.pth", "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt"]
FULL = ["latest", "rng_state.pth", "global_step2/mp_rank_00_model_states.pt"]


@pytest.mark.parametrize(
    ("files", "how", "script", "environment", "message"),
    [
        (SHARDED, "ZeRO-3", ALL_FULL, {}, None),
        (SHARDED, "ZeRO-2", ALL_FULL, {}, "its weights are sharded, by ZeRO-3, and this launch is ZeRO-2: laid out"),
        (FULL, "ZeRO-3", ALL_FULL, {}, "its weights are full, and this launch is ZeRO-3: laid out otherwise"),
        (FULL, "ZeRO-3", {"fused_lora": False}, {}, "its weights are full, and this launch is ZeRO-3"),
        (FULL, "ZeRO-3", {}, {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "is ZeRO-3 with offload"),
        (FULL, "ZeRO-3", {}, {}, None),
        (FULL, "ZeRO-1", ALL_FULL, {}, None),
        (SHARDED, "ZeRO-3", {}, {}, None),
    ],
)
def test_continuing_under_another_stage_of_deepspeed(monkeypatch, tmp_path, files, how, script, environment, message):
    launch_by(monkeypatch, how, **environment)
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = continuation_problems(tmp_path, script)
    assert ([message in problem for problem in found] == [True]) if message else found == []


@pytest.mark.parametrize(
    ("files", "how", "global_batch_size", "message"),
    [
        (["optimizer.pt", "rng_state.pth"], "one process", None, None),
        (["optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"], "one process", 8, None),
        (["optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"], "one process", None, "would take other rows"),
        (["optimizer.pt", "rng_state.pth"], "ZeRO-2", 8, "under one process or DDP, this launch is DeepSpeed"),
        (["latest", "rng_state_0.pth"], "DDP", 8, "under DeepSpeed, this launch is one process or DDP"),
        (["latest", "rng_state_0.pth", "rng_state_1.pth"], "ZeRO-2", 8, "state is sharded over 2"),
        (["optimizer_0", "rng_state_0.pth", "rng_state_1.pth"], "FSDP2", 8, None),
    ],
)
def test_continuing_with_another_strategy_or_number_of_processes(
    monkeypatch, tmp_path, files, how, global_batch_size, message
):
    launch_by(monkeypatch, how)
    for name in files:
        (tmp_path / name).touch()
    found = continuation_problems(tmp_path, {"global_batch_size": global_batch_size})
    assert (message in found[0]) if message else found == []


# Starting


ARGUMENTS = {"global_batch_size": 8, "seed": 1}
BEGUN_WITH = {"dataset": "d" * 64, "base": "b" * 64, "template": "t" * 64}


@pytest.fixture
def begun(tmp_path) -> Path:
    """A run with a checkpoint of step 4."""
    run = tmp_path / "run"
    assert start_or_continue(str(run), ARGUMENTS, BEGUN_WITH) is None
    put_in_place(write_checkpoint(run / "unfinished", 4), run / "checkpoint-4")
    return run


def test_a_run_goes_on_from_its_checkpoint(begun):
    assert start_or_continue(str(begun), ARGUMENTS, BEGUN_WITH) == str(begun / "checkpoint-4")
    with pytest.raises(ValueError, match="begun with other arguments \\(seed: 1 -> 2\\)"):
        start_or_continue(str(begun), ARGUMENTS | {"seed": 2}, BEGUN_WITH)
    assert [attempt["from_step"] for attempt in run_folder.read_progress(begun)["attempts"]] == [0, 4]


@pytest.mark.parametrize(
    ("name", "words"), [("dataset", "the rows of --dataset_name"), ("base", "the files of"), ("template", "the chat")]
)
def test_data_base_and_template_are_what_the_run_was_begun_with(begun, name, words):
    changed = BEGUN_WITH | {name: "e" * 64}
    with pytest.raises(ValueError, match=f"{words}.*not what this run was begun with.*--accept_changes"):
        start_or_continue(str(begun), ARGUMENTS, changed)
    assert start_or_continue(str(begun), ARGUMENTS, changed, accept_changes=True)
    noted = run_folder.read_begun_with(begun)
    assert noted["xxh3_128"] == changed and words in noted["accepted"][0]["changes"][0]
    assert start_or_continue(str(begun), ARGUMENTS, changed)  # accepted once and for all
    assert run_folder.read_begun_with(begun)["accepted"] == noted["accepted"]


def test_one_bit_of_the_data_is_another_fingerprint(tmp_path):
    (tmp_path / "train").mkdir()
    path = tmp_path / "train" / "data.arrow"
    path.write_bytes(b"picture" * 1000)
    before = of_folder(tmp_path, ("**/*.arrow",))
    assert of_folder(tmp_path, ("**/*.arrow",)) == before
    path.write_bytes(b"picturf" + b"picture" * 999)
    assert of_folder(tmp_path, ("**/*.arrow",)) != before
    assert of_folder(tmp_path / "elsewhere", ("**/*.arrow",)) is None


@pytest.mark.parametrize("text", ["", "---\n", "---\nglobal_batch_size: 8\n"])
def test_damaged_arguments_do_not_strand_a_run(begun, text):
    (begun / "arguments.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"arguments\.yaml: damaged .* Delete this file"):
        start_or_continue(str(begun), ARGUMENTS, BEGUN_WITH)
    (begun / "arguments.yaml").unlink()
    assert start_or_continue(str(begun), ARGUMENTS, BEGUN_WITH) == str(begun / "checkpoint-4")


def test_damaged_metrics_are_written_again_from_the_checkpoint_or_nothing_is_touched(begun):
    (begun / "metrics.json").write_text('{"train_loss": 0.')
    assert start_or_continue(str(begun), ARGUMENTS, BEGUN_WITH) == str(begun / "checkpoint-4")
    shutil.rmtree(begun / "checkpoint-4")
    with pytest.raises(ValueError, match=r"metrics\.json: damaged .* no checkpoint is here to write it again from"):
        start_or_continue(str(begun), ARGUMENTS, BEGUN_WITH)


@pytest.mark.slow
def test_a_job_that_is_queued_again_on_another_node_is_not_kept_out_by_its_own_lock(begun, monkeypatch):
    give_back(begun)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    start_or_continue(str(begun), ARGUMENTS, BEGUN_WITH)
    give_back(begun)
    lock_file(begun).write_text("4711\nnode7\n1\n")
    start_or_continue(str(begun), ARGUMENTS, BEGUN_WITH)
    give_back(begun)
    lock_file(begun).write_text("4711\nnode7\n1\n")
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(ValueError, match="a training by process 4711 on node7"):
        start_or_continue(str(begun), ARGUMENTS, BEGUN_WITH)
