"""Each part learns with its own rate: what the first step of AdamW moves says it, and every log."""

import json

import pytest
from safetensors.torch import load_file

from finetuning.arguments import ScriptArguments, TrainingArguments
from finetuning.preflight.features import rate_problems
from support.training import assert_equal_adapters, interrupted, train

FLAGS = (
    *("--language_model", "lora", "--projector", "full", "--vision_tower", "full", "--lr_scheduler_type", "constant"),
    *("--learning_rate", "1e-3", "--learning_rate_projector", "1e-4", "--learning_rate_vision_tower", "2e-5"),
    *("--lora_plus_ratio", "16", "--warmup_steps", "0", "--logging_steps", "1", "--max_grad_norm", "1e9"),
)


def bare(name: str) -> str:
    """A parameter's name without what PEFT and the file of the base put in."""
    return name.removeprefix("base_model.model.").removeprefix("model.").replace("vision_model.", "")


def weights(run):
    return load_file(run / "adapter_model.safetensors")


@pytest.mark.slow
def test_the_first_step_moves_each_part_by_its_own_rate(tiny_llava, cctv_dataset, tmp_path):
    run = train(tiny_llava, cctv_dataset, tmp_path / "run", *FLAGS, "--max_steps", "1")
    base = {bare(name): tensor for name, tensor in load_file(tiny_llava / "model.safetensors").items()}
    largest = {"lora_B": 0.0, "projector": 0.0, "vision_tower": 0.0}
    for name, tensor in weights(run).items():
        if "lora_B" in name:  # zero before
            largest["lora_B"] = max(largest["lora_B"], float(tensor.abs().max()))
        elif "lora_A" not in name:
            part = "projector" if "projector" in name else "vision_tower"
            largest[part] = max(largest[part], float((tensor - base[bare(name)]).abs().max()))
    # AdamW's first step is the rate times the gradient's sign, up to its epsilon; A's gradient is zero with B.
    assert largest == pytest.approx({"lora_B": 16e-3, "projector": 1e-4, "vision_tower": 2e-5}, rel=2e-2)
    (log,) = [log for log in json.loads((run / "trainer_state.json").read_text())["log_history"] if "loss" in log]
    assert log["learning_rate"] == 1e-3
    assert {name.partition("/")[2]: rate for name, rate in log.items() if name.startswith("learning_rate/")} == (
        pytest.approx({"lora_b": 16e-3, "projector": 1e-4, "vision_tower": 2e-5})
    )


@pytest.mark.slow
def test_a_run_with_rates_of_its_own_resumes_to_the_same_bits(tiny_llava, cctv_dataset, tmp_path):
    saved = (*FLAGS, "--save_strategy", "steps", "--save_steps", "2")
    run = train(tiny_llava, cctv_dataset, tmp_path / "run", *saved)
    again = train(tiny_llava, cctv_dataset, interrupted(run, tmp_path / "again"), *saved)
    assert_equal_adapters(again, run)


def test_rates_that_nothing_has_are_refused(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate_projector=1e-4, lora_plus_ratio=-1, optim="lomo"
    )
    problems = rate_problems(ScriptArguments(dataset_name="x", language_model="full"), args)
    assert [problem.split(":")[0] for problem in problems] == [
        *("learning_rate_projector", "lora_plus_ratio", "lora_plus_ratio", "optim"),
    ]
