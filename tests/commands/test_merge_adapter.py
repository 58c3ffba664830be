"""A merge is proven on what lies on disk: it equals base + adapter, and what is not equal leaves nothing behind."""

import json
import shutil

import pytest
import torch
import yaml
from merge_adapter import check_inputs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from finetuning.export import merge_run
from finetuning.export.merging import check_proof, compare_observations, make_probes, observe
from finetuning.model_card import write_run_card
from finetuning.models.loading import check_adapter_is_complete, load_base_model, load_for_inference
from finetuning.models.processing import load_processing_class
from finetuning.run_folder import write_metrics

DTYPE = torch.float32


def merge(run, output, dtype_name, rows, max_shard_size):
    """The command's work, its report in hand."""
    arguments = check_inputs(run, output)
    return merge_run.merge(run, output, arguments, dtype_name=dtype_name, rows=rows, max_shard_size=max_shard_size)


def make_run(folder, base, *, scale, whole=None, arguments=None):
    """A run's folder as training leaves it: LoRA on the language model with lora_B of this scale, parts trained whole."""
    model = load_base_model(str(base), dtype=DTYPE)
    torch.manual_seed(0)
    targets = r".*language_model.*(q_proj|v_proj|down_proj)" if whole is not None else "all-linear"
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, modules_to_save=whole, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale) if scale else parameter.data.zero_()
        elif "modules_to_save" in name and scale:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    load_processing_class(str(base)).save_pretrained(folder)
    (folder / "arguments.yaml").write_text(yaml.safe_dump(arguments or {"seed": 0}), encoding="utf-8")
    write_metrics(folder, {"completed": True})
    return folder


@pytest.fixture(scope="module")
def llava_run(tmp_path_factory, tiny_llava, cctv_dataset):
    return make_run(
        *(tmp_path_factory.mktemp("runs") / "llava", tiny_llava),
        scale=0.3,
        whole=["multi_modal_projector"],
        arguments={"dataset_name": str(cctv_dataset), "lora_r": 4},
    )


@pytest.fixture(scope="module")
def merged(llava_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "merged"
    return folder, merge(llava_run, folder, None, 2, "5GB")


def test_the_merged_model_on_disk_is_base_plus_adapter(merged, llava_run, tiny_llava):
    folder, report = merged
    assert report["dtype"] == "float32" and report["whole_parts"] == ["multi_modal_projector"]
    assert report["adapted_layers"] == 6  # three linear layers in each of two
    assert 0.99 * report["weights_in_them"] < report["weights_changed"] <= report["weights_in_them"]
    assert report["merged_against_tuned"]["mean_kl"] < 1e-9
    assert report["merged_against_tuned"]["equal_answers"] == len(report["answers"]) == 4
    assert report["base_against_tuned"]["mean_kl"] > 1e-3
    assert [answer["source"] for answer in report["answers"]] == ["built in"] * 2 + ["validation split"] * 2
    assert "quantised_run_against_merged" not in report

    # W + BA · alpha / r, recomputed from the files; everything else is the base's, or the adapter's own copy.
    base, tuned = load_file(tiny_llava / "model.safetensors"), load_file(folder / "model.safetensors")
    adapter = load_file(llava_run / "adapter_model.safetensors")
    assert tuned.keys() == base.keys()
    key = "language_model.model.layers.1.mlp.down_proj"
    name = next(name for name in adapter if "layers.1.mlp.down_proj.lora_A" in name)
    delta = adapter[name.replace("lora_A", "lora_B")] @ adapter[name] * (8 / 4)
    weight = next(name for name in base if name.endswith("layers.1.mlp.down_proj.weight") and "language_model" in name)
    torch.testing.assert_close(tuned[weight], base[weight] + delta, msg=key)
    projector = next(name for name in base if name.endswith("multi_modal_projector.linear_1.weight"))
    trained = next(name for name in adapter if name.endswith("multi_modal_projector.linear_1.weight"))
    assert torch.equal(tuned[projector], adapter[trained]) and not torch.equal(tuned[projector], base[projector])
    same = [name for name in base if torch.equal(base[name], tuned[name])]
    assert len(same) == len(base) - 6 - 4

    # It stands alone: processor with template, report and card travel along, no adapter file.
    assert json.loads((folder / "merge_report.json").read_text(encoding="utf-8")) == report
    _, processor = load_for_inference(str(folder))
    assert "generation %" not in processor.chat_template and "generation -%" not in processor.chat_template
    own = load_processing_class(str(tiny_llava))
    dialogue = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "7."}] * 2
    for prompt in (True, False):
        texts = [each.apply_chat_template(dialogue, add_generation_prompt=prompt) for each in (processor, own)]
        assert texts[0] == texts[1] and "7.</s>" in texts[0]
    assert not (folder / "adapter_config.json").exists()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "cctv" in card and "| lora_r | 4 |" in card and "Licence" in card
    assert "pipeline_tag: image-text-to-text" in card and "library_name: transformers" in card


def test_the_code_of_both_cards_answers_as_it_stands(merged, llava_run, raw_cctv, tmp_path, capsys, monkeypatch):
    """The run's own card and the merged model's, from where they lie."""
    write_run_card(llava_run)
    said = []
    for folder, library in ((merged[0], "transformers"), (llava_run, "peft")):
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert f"library_name: {library}" in card and "[More Information Needed]" not in card
        code = card.partition("```python\n")[2].partition("```")[0]
        shutil.copyfile(next(raw_cctv.rglob("*.jpg")), tmp_path / "picture.jpg")
        monkeypatch.chdir(tmp_path)
        (tmp_path / folder.name).symlink_to(folder)
        exec(compile(code, "card", "exec"), {})
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].strip()


def test_a_card_has_the_hubs_name_of_its_base_and_the_held_out_scores(llava_run, tmp_path):
    run = shutil.copytree(llava_run, tmp_path / "people")
    verdict = {
        "measure": "mean absolute error", "unit": "people", "base": 9.94, "tuned": 3.0, "difference": -6.94, "low": -8.54,
        "high": -5.35, "outcome": "better", "trivial": {"answer": "always 10 (train median)", "base": 4.74},
    }  # fmt: skip
    (run / "evaluation" / "test").mkdir(parents=True)
    (run / "evaluation" / "test" / "metrics.json").write_text(json.dumps({"verdict": [verdict]}))
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"})
    )
    write_run_card(run)
    card = (run / "README.md").read_text(encoding="utf-8")
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "llava-hf/llava-1.5-7b-hf" and header["license"] == "llama2"
    assert header["pipeline_tag"] == "image-text-to-text" and header["library_name"] == "peft"
    row = "| test | mean absolute error, people | 9.94 | 3.00 | -6.94 (-8.54 to -5.35) | 4.74: always 10 (train median) | better |"
    assert row in card


def test_a_merge_without_its_projector_is_not_proven(merged, llava_run, tiny_llava, tmp_path):
    folder, report = merged
    broken = shutil.copytree(folder, tmp_path / "broken")
    base, tuned = load_file(tiny_llava / "model.safetensors"), load_file(folder / "model.safetensors")
    dropped = {name: base[name] if "multi_modal_projector" in name else tuned[name] for name in tuned}
    save_file(dropped, broken / "model.safetensors", metadata={"format": "pt"})
    probes = make_probes(True, None, 0)
    model, processor = load_for_inference(str(llava_run))
    reference = observe(model, processor, probes, description="tuned")
    model, processor = load_for_inference(str(broken))
    distance = compare_observations(
        reference, observe(model, processor, probes, description="broken", follow=reference)
    )
    assert distance["mean_kl"] > 1e-6
    with pytest.raises(ValueError, match=r"not proven: the merged model's next tokens differ"):
        check_proof(report | {"merged_against_tuned": distance})


def test_an_adapter_file_without_the_projector_is_refused(llava_run, tmp_path):
    run = shutil.copytree(llava_run, tmp_path / "run")
    adapter = load_file(run / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in adapter.items() if "multi_modal_projector" not in name}
    assert len(adapter) - len(kept) == 4
    save_file(kept, run / "adapter_model.safetensors", metadata={"format": "pt"})
    check_adapter_is_complete(llava_run, ["multi_modal_projector"])
    with pytest.raises(ValueError, match="multi_modal_projector was trained in full"):
        merge(run, tmp_path / "merged", None, 0, "5GB")
    with pytest.raises(ValueError, match="multi_modal_projector was trained in full"):
        load_for_inference(str(run))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_zero_adapter_is_refused_and_nothing_stays(tiny_llava, tmp_path):
    run = make_run(tmp_path / "run", tiny_llava, scale=0, whole=["multi_modal_projector"])
    with pytest.raises(ValueError, match="changed no weight at all"):
        merge(run, tmp_path / "merged", None, 0, "5GB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_training_that_rounding_would_eat_is_refused(llava_run, tmp_path):
    """A merge whose distance from what was trained is as large as the training itself."""
    report = {
        "dtype": "bfloat16",
        "tolerance": {"mean_kl": 1e-2, "share_of_training": 0.5},
        "merged_against_tuned": {"mean_kl": 3e-4, "equal_answers": 1},
        "base_against_tuned": {"mean_kl": 4e-4},
        "answers": [{}],
    }
    with pytest.raises(ValueError, match="lost in rounding"):
        check_proof(report)
    check_proof(report | {"base_against_tuned": {"mean_kl": 4e-2}})


@pytest.mark.parametrize(
    "quantised", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"base_precision": "int8"}], ids=["nf4", "int8"]
)
def test_a_run_over_a_quantised_base_is_merged_into_16_bits_and_its_distance_is_reported(
    llava_run, tmp_path, quantised
):
    run = shutil.copytree(llava_run, tmp_path / "run")
    arguments = quantised | {"bf16": True}
    (run / "arguments.yaml").write_text(yaml.safe_dump(arguments), encoding="utf-8")
    report = merge(run, tmp_path / "merged", None, 0, "100KB")
    assert report["dtype"] == "bfloat16"
    assert report["merged_against_tuned"]["mean_kl"] < report["quantised_run_against_merged"]["mean_kl"]
    weights = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(weights) > 5
    assert {tensor.dtype for file in weights for tensor in load_file(file).values()} == {torch.bfloat16}
    assert not (tmp_path / "merged.unfinished").exists()


def test_a_gemma_run_is_merged(tiny_gemma, tmp_path):
    run = make_run(tmp_path / "run", tiny_gemma, scale=0.3)
    report = merge(run, tmp_path / "merged", None, 0, "5GB")
    assert report["adapted_layers"] == 14 and report["merged_against_tuned"]["mean_kl"] < 1e-9
    assert report["merged_against_tuned"]["equal_answers"] == 2


def test_mistakes_are_named_together_before_anything_is_loaded(tmp_path, tiny_llava):
    with pytest.raises(ValueError) as error:
        merge(tmp_path / "nothing", tiny_llava, None, 0, "5GB")
    assert "no such folder" in str(error.value) and "never overwritten" in str(error.value)
    with pytest.raises(ValueError, match="holds full weights, there is nothing to merge"):
        merge(tiny_llava, tmp_path / "merged", None, 0, "5GB")
