"""EVA begins LoRA from what layers read in the run's rows, as its paper says and PEFT computes it."""

import json

import pytest
import torch
from datasets import load_from_disk
from peft import EvaConfig
from peft.tuners.lora.eva import get_eva_state_dict

from finetuning.arguments import ModelArguments, ScriptArguments
from finetuning.data.label_audit import collate, undecoded
from finetuning.models.processing import load_processing_class
from finetuning.models.trainable import set_trainable
from finetuning.preflight.features import start_problems
from finetuning.training.eva import begin_from_inputs
from support.families import dataset_of, rows_of_all_shapes
from support.training import assert_equal_adapters, build, interrupted, merge_with_proof, train


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    some = rows_of_all_shapes()[:4]
    return load_from_disk(dataset_of(some, some[:1], tmp_path_factory.mktemp("data") / "rows"))["train"]


def placed(folder, **settings):
    torch.manual_seed(0)
    script_args = ScriptArguments(dataset_name="x", vision_tower="lora", projector="lora")
    settings = {"lora_r": 4, "lora_alpha": 8, "init_lora_weights": "eva"} | settings
    return set_trainable(build(folder), script_args, ModelArguments(**settings)).eval()


def starts_of(model):
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_A." in name}


def test_it_begins_in_the_largest_directions_of_the_inputs_as_peft_does(tiny_llava, rows, tmp_path):
    processor = load_processing_class(str(tiny_llava))
    batch = dict(collate(processor, undecoded(rows, [0, 1, 2, 3])))
    model = placed(tiny_llava)
    with torch.no_grad():
        before = model(**batch).logits
    read = {}
    layer = model.get_base_model().model.language_model.layers[0]
    hook = layer.self_attn.q_proj.register_forward_pre_hook(lambda module, inputs: read.update(x=inputs[0]))
    begin_from_inputs(model, rows, processor)
    hook.remove()

    # The paper: right singular vectors of the inputs, those of the largest singular values.
    x = read["x"][batch["attention_mask"].bool()]
    directions = torch.linalg.svd(x - x.mean(0))[2][:4]
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        cosines = torch.nn.functional.cosine_similarity(projection.lora_A["default"].weight, directions)
        torch.testing.assert_close(cosines.abs(), torch.ones(4), rtol=0, atol=2e-3)  # found by iteration
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)

    # PEFT's own directions, of every layer of the language model, the same rank for all, from the same tokens.
    own = {name: start.detach().clone() for name, start in starts_of(model).items() if "language_model" in name}
    config = model.peft_config["default"]
    config.eva_config = EvaConfig(rho=1.0, use_label_mask=False)
    config.target_modules = r".*language_model\..*_proj"
    theirs = get_eva_state_dict(build(tiny_llava), [batch], config, show_progress_bar=False)
    assert len(theirs) == len(own) == 14
    for name, directions in theirs.items():
        start = own[f"base_model.model.{name}.lora_A.default.weight"]
        assert (torch.nn.functional.cosine_similarity(start, directions).abs() > 0.98).all(), name


def test_what_is_saved_is_plain_lora(tiny_llava, rows, tmp_path):
    model = placed(tiny_llava, lora_r=6)
    begin_from_inputs(model, rows, load_processing_class(str(tiny_llava)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"], config["rank_pattern"]) == (6, True, {})
    assert config["eva_config"] is None and not config["alpha_pattern"]
    for start in starts_of(model).values():
        torch.testing.assert_close(start @ start.T, torch.eye(6), rtol=0, atol=1e-4)


def test_what_it_cannot_begin_from_is_refused(tiny_llava, rows, monkeypatch):
    with pytest.raises(
        ValueError, match=r"eva: lora_r: 200, but .* reads \d+ vectors of \d+ numbers at once: set a smaller"
    ):
        begin_from_inputs(placed(tiny_llava, lora_r=200), rows, load_processing_class(str(tiny_llava)))
    script_args, model_args = ScriptArguments(dataset_name="x"), ModelArguments(init_lora_weights="eva")
    assert start_problems(script_args, ModelArguments(init_lora_weights="eva", load_in_4bit=True)) == []
    monkeypatch.setattr("finetuning.strategy.Strategy.shards_weights", True)
    (problem,) = start_problems(script_args, model_args)
    assert "eva asks the whole model before it is trained" in problem


@pytest.mark.slow
def test_a_run_from_eva_resumes_to_the_same_bits_and_merges(tiny_llava, cctv_dataset, tmp_path):
    flags = ("--init_lora_weights", "eva", "--lora_r", "4", "--vision_tower", "frozen", "--eval_answers", "0")
    flags += ("--save_strategy", "steps", "--save_steps", "2")
    run = train(tiny_llava, cctv_dataset, tmp_path / "run", *flags)
    again = train(tiny_llava, cctv_dataset, interrupted(run, tmp_path / "again"), *flags)
    assert_equal_adapters(again, run)
    merge_with_proof(run, tmp_path / "merged")
