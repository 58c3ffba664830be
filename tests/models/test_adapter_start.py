"""PiSSA and OLoRA begin as their papers say, leave the model as it was, and are saved as LoRA that fits the base itself."""

import json

import pytest
import torch
from peft import PeftModel

from finetuning.arguments import ModelArguments, ScriptArguments
from finetuning.data.collator import LlavaDataCollator
from finetuning.models.adapter_start import write_against_base
from finetuning.models.processing import load_processing_class
from finetuning.models.trainable import set_trainable
from finetuning.preflight.features import start_problems
from support.families import rows_of_all_shapes
from support.training import assert_equal_adapters, build, interrupted, merge_with_proof, train

STARTS = ["pissa", "pissa_niter_16", "olora"]


def placed(folder, start, **flags):
    torch.manual_seed(0)
    model_args = ModelArguments(init_lora_weights=start, lora_r=4, lora_alpha=8, **flags)
    return set_trainable(build(folder), ScriptArguments(dataset_name="x"), model_args).eval()


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize("rslora", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", STARTS)
def test_the_model_begins_as_it_was_and_is_saved_against_the_base(start, rslora, tiny_llava, tmp_path):
    batch = LlavaDataCollator(load_processing_class(str(tiny_llava)))(rows_of_all_shapes())
    base, model = build(tiny_llava).eval(), placed(tiny_llava, start, use_rslora=rslora)
    torch.testing.assert_close(logits(model, batch), logits(base, batch), rtol=0, atol=1e-4)

    # The paper's first step: s B A is the base's part of the largest singular values (PiSSA), or the first rows of QR.
    layer = model.get_base_model().model.language_model.layers[0].self_attn.q_proj
    weight = base.model.language_model.layers[0].self_attn.q_proj.weight
    taken = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    if start == "pissa":
        u, s, v = torch.linalg.svd(weight)
        torch.testing.assert_close(taken, u[:, :4] @ torch.diag(s[:4]) @ v[:4], rtol=0, atol=1e-5)
        norms = layer.lora_A["default"].weight.norm(dim=1), layer.lora_B["default"].weight.norm(dim=0)
        torch.testing.assert_close(*norms)  # each has the root of the singular values
    torch.testing.assert_close(layer.get_base_layer().weight, weight - taken, rtol=0, atol=1e-6)
    assert float(taken.detach().norm()) > 0.1 * float(weight.detach().norm())

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    expected = logits(model, batch)
    assert float((expected - logits(base, batch)).abs().max()) > 0.01
    model.save_pretrained(tmp_path)
    write_against_base(tmp_path, model.adapter_start)
    loaded = PeftModel.from_pretrained(build(tiny_llava), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-4)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, batch), logits(base, batch), rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_from_pissa_resumes_to_the_same_bits_and_merges(tiny_llava, cctv_dataset, tmp_path):
    flags = ("--init_lora_weights", "pissa", "--lora_r", "4", "--vision_tower", "frozen", "--eval_answers", "0")
    flags += ("--save_strategy", "steps", "--save_steps", "2")
    run = train(tiny_llava, cctv_dataset, tmp_path / "run", *flags)
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 128, True)
    again = train(tiny_llava, cctv_dataset, interrupted(run, tmp_path / "again"), *flags)
    assert_equal_adapters(again, run)
    merge_with_proof(run, tmp_path / "merged")


@pytest.mark.slow
def test_a_run_of_dora_is_fused_resumes_to_the_same_bits_and_merges(tiny_llava, cctv_dataset, tmp_path, capsys):
    flags = ("--use_dora", "true", "--lora_r", "4", "--vision_tower", "frozen", "--eval_answers", "0")
    flags += ("--save_strategy", "steps", "--save_steps", "2")
    run = train(tiny_llava, cctv_dataset, tmp_path / "run", *flags)
    said = capsys.readouterr().out
    assert "LoRA layers computed in one piece" in said and "by PEFT's own code" not in said
    again = train(tiny_llava, cctv_dataset, interrupted(run, tmp_path / "again"), *flags)
    assert_equal_adapters(again, run)
    merge_with_proof(run, tmp_path / "merged")


def test_a_start_that_the_base_cannot_give_is_refused():
    model_args = ModelArguments(init_lora_weights="pissa", load_in_4bit=True)
    (problem,) = start_problems(ScriptArguments(dataset_name="x"), model_args)
    assert "takes directions out of the base, which quantised weights would lose in rounding" in problem
    (problem,) = start_problems(
        ScriptArguments(dataset_name="x", language_model="full"), ModelArguments(init_lora_weights="gaussian")
    )
    assert "no part has LoRA" in problem
