"""What is read from a checkpoint is tensors: nothing in it is run."""

import os

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

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
