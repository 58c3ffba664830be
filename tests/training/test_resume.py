"""Where a run starts and continues, and what of a launch does not fit what was begun."""

import pytest

from finetuning import run_folder
from finetuning.training.resume import continuation_problems, refuse_futile_restart
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


DIVIDED = ["latest", "rng_state.pth", "global_step2/zero_pp_rank_0_mp_rank_00_model_states.pt"]
WHOLE = ["latest", "rng_state.pth", "global_step2/mp_rank_00_model_states.pt"]


@pytest.mark.parametrize(
    ("files", "how", "script", "environment", "message"),
    [
        (DIVIDED, "ZeRO-3", ALL_FULL, {}, None),
        (DIVIDED, "ZeRO-2", ALL_FULL, {}, "its weights are divided, by ZeRO-3, and this launch is ZeRO-2: laid out"),
        (WHOLE, "ZeRO-3", ALL_FULL, {}, "its weights are whole, and this launch is ZeRO-3: laid out otherwise"),
        (WHOLE, "ZeRO-3", {"fused_lora": False}, {}, "its weights are whole, and this launch is ZeRO-3"),
        (WHOLE, "ZeRO-3", {}, {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "is ZeRO-3 with offload"),
        (WHOLE, "ZeRO-3", {}, {}, None),
        (WHOLE, "ZeRO-1", ALL_FULL, {}, None),
        (DIVIDED, "ZeRO-3", {}, {}, None),
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
        (["latest", "rng_state_0.pth", "rng_state_1.pth"], "ZeRO-2", 8, "state is divided by 2"),
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
