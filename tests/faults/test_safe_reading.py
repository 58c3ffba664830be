"""What is read from a checkpoint is tensors: nothing in it is run."""

import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from finetuning.distributed import fsdp2
from finetuning.distributed.deepspeed_zero import load_tensors_only, read_tensors_only


class Runs:
    """Pickled, it makes a folder when it is read."""

    def __init__(self, folder: str):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_deepspeeds_reader_builds_tensors_and_runs_nothing(tmp_path):
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    state = {"exp_avg": torch.ones(3), "stage": ZeroStageEnum.gradients, "loss_scaler": LossScaler(scale=1)}
    torch.save(state, path)
    read = load_tensors_only(None, str(path))
    assert torch.equal(read["exp_avg"], state["exp_avg"]) and read["loss_scaler"].cur_scale == 1
    torch.save(state | {"more": Runs(str(tmp_path / "run"))}, path)
    with pytest.raises(
        ValueError, match=r"optim_states\.pt: holds posix\.mkdir, which is no tensor and could run code"
    ):
        load_tensors_only(None, str(path))
    assert not (tmp_path / "run").exists()


def test_the_reader_can_be_replaced_again_in_one_process(monkeypatch):
    monkeypatch.setattr(TorchCheckpointEngine, "load", TorchCheckpointEngine.load)
    for _ in range(2):
        read_tensors_only()
    assert TorchCheckpointEngine.load is load_tensors_only


@pytest.fixture
def reads_tensors_only(monkeypatch):
    """PyTorch's readers of sharded checkpoints replaced, for one test."""
    monkeypatch.setattr(filesystem, "pickle", pickle)
    monkeypatch.setattr(DefaultLoadPlanner, "load_bytes", DefaultLoadPlanner.load_bytes)
    fsdp2.read_tensors_only()


def test_fsdp2s_checkpoints_are_read_as_tensors_and_plain_values(reads_tensors_only, tmp_path):
    state = {
        "weight": torch.arange(6.0, dtype=torch.bfloat16),
        "groups": {"lr": 0.5, "betas": (0.9, 0.99), "name": "a"},
    }
    dcp.save(state, checkpoint_id=tmp_path / "whole")
    read = {"weight": torch.zeros(6, dtype=torch.bfloat16), "groups": {"lr": 0.0, "betas": None, "name": ""}}
    dcp.load(read, checkpoint_id=tmp_path / "whole")
    assert torch.equal(read.pop("weight"), state.pop("weight")) and read == state


def test_a_description_that_would_run_code_is_refused(reads_tensors_only, tmp_path):
    dcp.save({"value": torch.ones(1)}, checkpoint_id=tmp_path / "bad")
    for harmful in (Runs(str(tmp_path / "run")), {"name": Runs(str(tmp_path / "run"))}):
        (tmp_path / "bad" / ".metadata").write_bytes(pickle.dumps(harmful))
        with pytest.raises(CheckpointException, match=r"\.metadata holds posix\.mkdir, which describes no tensor"):
            dcp.load({"value": torch.zeros(1)}, checkpoint_id=tmp_path / "bad")
    assert not (tmp_path / "run").exists()


def test_bytes_in_a_sharded_checkpoint_that_would_run_code_are_refused(reads_tensors_only, tmp_path):
    dcp.save({"value": Runs(str(tmp_path / "run"))}, checkpoint_id=tmp_path / "bad")
    with pytest.raises(CheckpointException, match=r"Unsupported operand|Unsupported global|Weights only"):
        dcp.load({"value": None}, checkpoint_id=tmp_path / "bad")
    assert not (tmp_path / "run").exists()
