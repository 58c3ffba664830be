"""A run's plan: measured values are found in its log, and the line that says when it ends."""

import dataclasses
import datetime
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from finetuning.arguments import parse_arguments
from finetuning.command_line import flag_parser
from finetuning.data.dataset import open_dataset
from finetuning.model_shape import ModelShape
from finetuning.models.processing import load_config, load_processing_class
from finetuning.preflight.planned_step import Training
from finetuning.preflight.planner import Workload, make_plan
from finetuning.preflight.row_lengths import Lengths, Sequence
from finetuning.preflight.step_time import gpu_named, known_gpus
from finetuning.run_folder import read_progress
from finetuning.strategy import Strategy
from finetuning.training.dry_run import dry_run
from finetuning.training.planned_run import first_line, measured_of, note_plan, plan_run
from support.training import folders

RECIPE = ROOT / "scripts" / "configs" / "llava_lora.yaml"
ROWS = Lengths(total=100, rows=100, counted=[Sequence(120, 30, 0)] * 10, longest=[Sequence(200, 40, 0)] * 8)
GEMMA = ModelShape.from_config({"model_type": "gemma", "hidden_size": 2048, "num_hidden_layers": 18})


def test_what_a_log_says_is_compared():
    planned = {"samples_per_step": 8}
    log = [{"loss": 1.0, "samples_per_second": 2.0, "peak_memory_gib": 3.0}]
    log += [{"loss": 1.0, "samples_per_second": rate, "peak_memory_gib": 3.5} for rate in (16.0, 15.0, 17.0)]
    assert measured_of(planned, [*log, {"eval_loss": 1.0}]) == {"seconds_per_step": 0.5, "peak_memory_gib": 3.5}
    assert measured_of(None, log) == measured_of(planned, []) == {}


def test_steps_epochs_and_the_end_follow_from_rows():
    settings = {action.dest: action.default for action in flag_parser()._actions} | {
        "model_name_or_path": "x",
        "dataset_name": "y",
        "num_train_epochs": 2.0,
        "eval_strategy": "epoch",
    }
    workload = Workload(settings, GEMMA, ROWS, ROWS, False)
    plan = make_plan(workload, known_gpus()["a100-80"], Strategy("DDP", num_processes=2), bits=None)
    assert (plan.steps, plan.evaluations, plan.tokens) == (14, 2, 14 * 16 * 120)
    assert plan.batch.length == 200 and plan.fits
    accumulated = make_plan(
        dataclasses.replace(workload, settings=settings | {"global_batch_size": 32, "per_device_train_batch_size": 4}),
        known_gpus()["a100-80"], Strategy("one process"), bits=None,
    )  # fmt: skip
    assert (accumulated.accumulation, accumulated.steps) == (8, 8)
    line = first_line(plan, datetime.datetime(2026, 11, 30, 23, 59, 0) - datetime.timedelta(seconds=plan.seconds))
    assert "14 steps of" in line and "to end about 2026-11-30 23:59" in line


def test_gpus_are_known_by_the_drivers_name():
    names = {"Tesla T4": "t4", "NVIDIA L40S": "l40s", "NVIDIA L4": "l4", "NVIDIA A100-SXM4-40GB": "a100-40"}
    names |= {"NVIDIA A100 80GB PCIe": "a100-80", "NVIDIA H200": "h200", "NVIDIA GeForce RTX 3060": "rtx3060"}
    sizes = known_gpus()
    assert {name: gpu_named(name, sizes[kind].memory).name for name, kind in names.items()} == names
    assert gpu_named("Quadro P400", 2**30) is None
    assert isinstance(Training(GEMMA, {"language_model": "full"}).trained, int)


def test_a_run_on_a_gpu_is_planned_or_refused(cctv_dataset, tiny_llava, tmp_path, monkeypatch, capsys):
    groups = parse_arguments(RECIPE, folders(tiny_llava, cctv_dataset, tmp_path))
    assert plan_run(*groups) is None  # on a CPU
    groups[1].use_cpu = False
    properties = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30, fraction=1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: properties.fraction)
    plan = plan_run(*groups)
    assert plan.training.precision == "fp16" and "planned: " in capsys.readouterr().out
    note_plan(tmp_path, plan)
    planned = read_progress(tmp_path)["planned"]
    assert planned["samples_per_step"] == 8 and planned["seconds_per_step"] > 0
    properties.fraction = 2**-8  # of 15 GiB: the process may have 60 MiB
    with pytest.raises(ValueError, match="memory: a step needs about"):
        plan_run(*groups)
    properties.name = "Quadro P400"
    assert plan_run(*groups) is None and "not in scripts/gpus.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("vision", [True, False])
def test_a_dry_run_ends_before_weights(vision, cctv_dataset, tiny_llava, tiny_gemma, tmp_path, capsys):
    model = tiny_llava if vision else tiny_gemma
    script_args, training_args, model_args = parse_arguments(RECIPE, folders(model, cctv_dataset, tmp_path / "run"))
    rows = open_dataset(str(cctv_dataset), vision=vision)["train"]
    processing_class, config = load_processing_class(str(model)), load_config(str(model))
    dry_run(script_args, training_args, model_args, config, rows, processing_class)
    said = capsys.readouterr().out
    assert "longest batch: 8 rows of" in said and "logits (8, " in said
    assert not (tmp_path / "run").exists()
