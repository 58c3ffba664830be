"""Training LLaVA for real, on a model of a million parameters: what moves, what is saved, what is refused."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from datasets import load_from_disk
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from finetuning.arguments import parse_arguments
from finetuning.data.collator import LlavaDataCollator
from finetuning.device import choose_precision
from finetuning.models.loading import load_for_inference
from finetuning.models.parts import base_model_of, decoder_layers
from finetuning.models.processing import load_processing_class
from finetuning.models.trainable import set_trainable
from finetuning.training.trainer import FineTuningTrainer, TrainingDiverged
from support.raw_data import with_pictures
from support.training import SAMPLE, build, train


def dialogue(*texts: str, system: str | None = None) -> list[dict]:
    turns = [{"role": "system", "content": system}] if system else []
    return turns + [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


# ---- labels and template ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["tiny", "real"])
def test_only_answers_and_their_end_are_supervised_and_the_prompt_is_what_inference_sends(which, request, tiny_llava):
    folder = tiny_llava if which == "tiny" else request.getfixturevalue("real_llava_processor")
    processor = load_processing_class(str(folder))
    tokenizer, collator = processor.tokenizer, LlavaDataCollator(processor)
    image = Image.new("RGB", (64, 48), (90, 120, 200))
    rows = [
        {
            "messages": dialogue("How many people?", "There are 23 people.", "그럼 남자는요?", "일곱 명입니다."),
            "images": [image],
        },
        {"messages": dialogue("몇 명인가요?", "23명", system="Answer briefly."), "images": [image]},
    ]
    batch = collator(rows)
    num_image_tokens = (processor.image_processor.crop_size["height"] // processor.patch_size) ** 2
    for row, ids, labels, mask in zip(rows, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        assert (ids == processor.image_token_id).sum() == num_image_tokens
        assert (ids == tokenizer.bos_token_id).sum() == 1
        assert (labels[mask == 0] == -100).all()
        spans = tokenizer.decode(labels[labels != -100]).split(tokenizer.eos_token)
        answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        assert [span.strip() for span in spans] == [*answers, ""]  # each answer ends with </s>
        for turn in (index for index, message in enumerate(row["messages"]) if message["role"] == "assistant"):
            prompt = collator.prompts([{"messages": row["messages"][:turn], "images": row["images"]}])["input_ids"][0]
            assert ids[: len(prompt)].tolist() == prompt.tolist()
            assert labels[len(prompt) - 1] == -100 and labels[len(prompt)] != -100
    if which == "real":
        assert num_image_tokens == 576


def test_padding_shows_the_whole_frame_and_cropping_does_not(tiny_llava):
    frame = Image.new("RGB", (160, 120))
    frame.paste((255, 255, 255), (0, 0, 12, 120))  # something at the left edge only
    brightest = {}
    for mode in ("pad", "crop"):
        processor = load_processing_class(str(tiny_llava), image_aspect_ratio=mode)
        processor.image_processor.do_pad = mode == "pad"
        brightest[mode] = processor.image_processor(frame, return_tensors="pt")["pixel_values"][:, :, 32].max().item()
    assert brightest["pad"] > 1.9 > 0 > brightest["crop"]


def test_a_role_the_template_does_not_know_is_an_error(tiny_llava):
    collator = LlavaDataCollator(load_processing_class(str(tiny_llava)))
    with pytest.raises(Exception, match="message 2 has the role 'system'"):
        collator([{"messages": [*dialogue("a"), {"role": "system", "content": "b"}], "images": []}])


def test_an_image_mark_in_the_text_is_an_error(tiny_llava):
    """It would become 576 image tokens without a picture."""
    collate = LlavaDataCollator(load_processing_class(str(tiny_llava)))
    messages = [{"role": "user", "content": "<image> How many?"}, {"role": "assistant", "content": "2"}]
    with pytest.raises(ValueError, match=r"row 7: <image> in the text: '<image> How many\?'\. Remove it there"):
        collate([{"messages": messages, "images": [Image.new("RGB", (40, 40))], "row": 7}])


def test_checkpointing_asks_a_frozen_vision_tower_for_no_gradient(tiny_llava, cctv_dataset, tmp_path):
    """transformers would checkpoint every part, and compute the gradient of the picture through the whole tower."""
    script_args, args, lora_args = parse_arguments(SAMPLE, [
        *("--gradient_checkpointing", "true", "--checkpoint_layers", "1", "--max_steps", "1", "--save_strategy", "no"),
        *("--vision_tower", "frozen", "--projector", "frozen", "--eval_strategy", "no", "--report_to", "none"),
        *("--output_dir", str(tmp_path)),
    ])  # fmt: skip
    args.remove_unused_columns = False
    processor = load_processing_class(str(tiny_llava))
    base = build(tiny_llava).eval()  # as it is when it has been loaded
    model = set_trainable(base, script_args, lora_args)
    tower, projector = model.get_base_model().model.vision_tower, model.get_base_model().model.multi_modal_projector
    features = []
    projector.register_forward_hook(lambda module, inputs, output: features.append(output))
    trainer = FineTuningTrainer(
        model=model, args=args, train_dataset=with_pictures(cctv_dataset)["train"], processing_class=processor,
        data_collator=LlavaDataCollator(processor), checkpoint_layers=script_args.checkpoint_layers,
    )  # fmt: skip
    passes = Counter()
    for index, layer in enumerate(decoder_layers(model)):
        layer.input_layernorm.register_forward_hook(lambda *_, index=index: passes.update([index]))
    trainer.train()
    assert all(module.training for module in model.modules())
    assert passes == {0: 2, 1: 1}  # the first layer once more in the backward pass
    assert len(features) == 1 and not features[0].requires_grad
    assert not any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
    assert [layer.gradient_checkpointing for layer in decoder_layers(model)] == [True, False]


# ---- a run -----------------------------------------------------------------------------------------------------------


FLAGS = ["--vision_tower", "frozen", "--eval_strategy", "steps", "--eval_steps", "4", "--eval_answers", "3"]
FLAGS += ["--logging_steps", "1"]


@pytest.fixture(scope="module")
def run(tiny_llava, cctv_dataset, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("outputs") / "run"
    return train(tiny_llava, cctv_dataset, output, *FLAGS)


def test_what_the_recipe_trains_moves_and_nothing_else(run, tiny_llava):
    saved = load_file(run / "adapter_model.safetensors")
    base = build(tiny_llava)
    assert {name.split(".")[3] for name in saved} == {"language_model", "multi_modal_projector"}
    assert all(value.dtype == torch.float32 for value in saved.values())
    moved = [name for name in saved if "lora_B" in name and saved[name].abs().max() > 0]
    assert len(moved) == 14  # B starts at zero in all 7 linear layers of both decoder layers
    weight = saved["base_model.model.model.multi_modal_projector.linear_1.weight"]
    assert not torch.equal(weight, base.model.multi_modal_projector.linear_1.weight)
    tuned, _ = load_for_inference(str(run))
    assert isinstance(tuned, PeftModel)
    frozen = {name: value for name, value in base.state_dict().items() if "multi_modal_projector" not in name}
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value
        for name, value in tuned.state_dict().items()
    }
    assert all(torch.equal(value, after[name]) for name, value in frozen.items())


def test_the_run_folder_holds_exactly_what_is_promised(run):
    assert {path.name for path in run.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "arguments.yaml", "begun_with.json", "chat_template.jinja", "manifest.json", "metrics.json",
        "processor_config.json", "progress.json", "README.md", "runs", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
    }  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["completed"] is True and metrics["global_step"] == 4
    assert metrics["eval_count_n"] == 3 and metrics["eval_loss"] > 0
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    first = history[0]
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "samples_per_second",
        "tokens_per_second",
        "data_wait",
    } <= first.keys()
    assert list((run / "runs").rglob("events.out.tfevents.*"))
    processor = AutoProcessor.from_pretrained(run)
    assert processor.image_processor.do_pad and "endgeneration" in processor.chat_template


def test_the_saved_arguments_are_a_recipe_again(run):
    again = parse_arguments(SAMPLE, ["--config", str(run / "arguments.yaml"), "--output_dir", "elsewhere"])
    assert again[1].max_steps == 4 and again[0].projector == "full" and again[1].output_dir == "elsewhere"
    assert not any("token" in key.split("_") for key in yaml.safe_load((run / "arguments.yaml").read_text()))


def test_a_completed_run_is_kept(run, tiny_llava, cctv_dataset, capsys):
    weights = (run / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"a complete run with other arguments is here \(.*max_steps: 4 -> 5"):
        train(tiny_llava, cctv_dataset, run, *FLAGS, "--max_steps", "5")
    with pytest.raises(SystemExit) as end:
        train(tiny_llava, cctv_dataset, run, *FLAGS)
    assert end.value.code == 0 and "this run is complete (4 steps, train loss" in capsys.readouterr().out
    assert (run / "adapter_model.safetensors").read_bytes() == weights
    train(tiny_llava, cctv_dataset, run, "--overwrite_completed_run", "true", "--max_steps", "1")
    kept = run.with_name("run.previous-1")
    assert (kept / "adapter_model.safetensors").read_bytes() == weights
    assert json.loads((run / "metrics.json").read_text())["global_step"] == 1


def test_a_4bit_base_keeps_fp32_adapters_and_sees_in_full_precision(tiny_llava, cctv_dataset, tmp_path):
    run = train(
        *(tiny_llava, cctv_dataset, tmp_path / "qlora", "--load_in_4bit", "true", "--use_bnb_nested_quant", "true"),
        *("--vision_tower", "frozen", "--lora_dropout", "0.05", "--gradient_checkpointing", "true"),
    )
    saved = load_file(run / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())
    # Values that bf16 cannot hold: the adapters were never rounded to it.
    assert any(not torch.equal(value, value.bfloat16().float()) for name, value in saved.items() if "lora_B" in name)
    model, _ = load_for_inference(str(run))
    kinds = {
        name: type(module).__name__
        for name, module in model.named_modules()
        if name.endswith(("q_proj.base_layer", "q_proj"))
    }
    assert {kind for name, kind in kinds.items() if "vision_tower" in name} == {"Linear"}
    assert {kind for name, kind in kinds.items() if name.endswith("base_layer")} == {"Linear4bit"}


@pytest.mark.parametrize(("name", "least"), [("crps", 1.0), ("ntl", 0.5)])
def test_a_loss_over_numbers_is_added_and_logged(tiny_llava, cctv_dataset, tmp_path, name, least):
    # An untrained model is off by more people, or digits, than this.
    flags = ("--max_steps", "2", "--logging_steps", "1", "--gradient_accumulation_steps", "2", "--number_loss", name)
    run = train(tiny_llava, cctv_dataset, tmp_path / name, *flags)
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    logged = [entry["number_loss"] for entry in history if "number_loss" in entry]
    assert len(logged) == 2
    assert min(logged) > least


def test_a_full_run_saves_a_model_of_its_own(tiny_llava, cctv_dataset, tmp_path):
    flags = [word for part in ("language_model", "projector", "vision_tower") for word in (f"--{part}", "full")]
    run = train(tiny_llava, cctv_dataset, tmp_path / "full", *flags, "--max_steps", "2")
    assert (run / "model.safetensors").is_file() and not (run / "adapter_config.json").exists()
    tuned, _ = load_for_inference(str(run))
    base = build(tiny_llava).state_dict()
    still = {name for name, value in tuned.state_dict().items() if torch.equal(value, base[name])}
    assert all("vision_tower" in name and ("layers.3." in name or "post_layernorm" in name) for name in still)


def test_a_full_run_continues_from_its_weights_and_keeps_the_best(tiny_llava, cctv_dataset, tmp_path):
    """The names on disk are not the model's: transformers' Trainer would load nothing and go on with a warning."""
    flags = [word for part in ("language_model", "projector", "vision_tower") for word in (f"--{part}", "full")]
    flags += ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--eval_answers", "0", "--metric_for_best_model", "eval_loss", "--greater_is_better", "true"]
    whole = train(tiny_llava, cctv_dataset, tmp_path / "whole", *flags)
    first = load_file(whole / "checkpoint-2" / "model.safetensors")
    # The loss falls, and the greatest is kept: that of step 2.
    assert json.loads((whole / "metrics.json").read_text())["kept_step"] == 2
    kept = load_file(whole / "model.safetensors")
    assert all(torch.equal(kept[name], first[name]) for name in first)
    last = load_file(whole / "checkpoint-4" / "model.safetensors")
    assert not all(torch.equal(last[name], first[name]) for name in first)
    # As a kill leaves it: no result, and no later checkpoint.
    shutil.rmtree(whole / "checkpoint-4")
    for name in ("metrics.json", "model.safetensors", "manifest.json"):
        (whole / name).unlink()
    train(tiny_llava, cctv_dataset, whole, *flags)
    again = load_file(whole / "checkpoint-4" / "model.safetensors")
    assert all(torch.equal(again[name], last[name]) for name in last)


def test_a_killed_run_continues_to_the_same_weights(tiny_llava, cctv_dataset, tmp_path):
    """The second start goes on from the last checkpoint and ends bit for bit where an uninterrupted run ends."""
    flags = ["--save_strategy", "steps", "--save_steps", "2", "--max_steps", "14", "--lora_dropout", "0.1"]
    flags += ["--image_augmentation", "flip", "brightness", "blur", "shift"]  # drawn by epoch and row
    flags += ["--image_tiles", "2x1"]
    whole = train(tiny_llava, cctv_dataset, tmp_path / "whole", *flags)
    command = [sys.executable, "-c", "import sys; sys.path[:0] = ['scripts', 'tests']; from support.training import *; "
               "train(*map(Path, sys.argv[1:4]), *sys.argv[4:])"]  # fmt: skip
    command += [str(tiny_llava), str(cctv_dataset), str(tmp_path / "killed"), *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    # 36 rows, 4 a step: within the second epoch, whose rows come in an order of their own (accelerate#2016).
    while not (tmp_path / "killed" / "checkpoint-10" / "trainer_state.json").is_file():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "adapter_model.safetensors").exists()
    with pytest.raises(ValueError, match=r"begun with other arguments \(learning_rate: 0.001 -> 0.1\)"):
        train(tiny_llava, cctv_dataset, tmp_path / "killed", *flags, "--learning_rate", "0.1")
    killed = train(tiny_llava, cctv_dataset, tmp_path / "killed", *flags)
    assert json.loads((killed / "progress.json").read_text())["attempts"][-1]["from_step"] >= 10
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, killed))
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    # A checkpoint is a model too, with the projector that was trained beside the adapter (LLaVA#844, #729).
    model, _ = load_for_inference(str(killed / "checkpoint-12"))
    name = next(name for name in found if "multi_modal_projector.linear_1.weight" in name)
    projector = base_model_of(model).model.multi_modal_projector.linear_1.weight
    assert torch.equal(projector, load_file(killed / "checkpoint-12" / "adapter_model.safetensors")[name])


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_rows(tiny_llava, cctv_dataset, tmp_path):
    broken = tmp_path / "broken"
    model = build(tiny_llava)
    model.model.language_model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(broken)
    AutoProcessor.from_pretrained(tiny_llava).save_pretrained(broken)
    with pytest.raises(TrainingDiverged, match=r"the loss is nan at step 1\. Training rows of this batch:") as raised:
        train(broken, cctv_dataset, tmp_path / "out")
    rows = load_from_disk(str(cctv_dataset))["train"].select_columns(["messages"])
    named = [line.strip() for line in str(raised.value).splitlines() if line.startswith("  row ")]
    assert len(named) == 4
    for line in named:
        number, text = line.removeprefix("row ").split(": ", 1)
        assert text.endswith(rows[int(number)]["messages"][-1]["content"])


# ---- what is refused, in one sentence and without a stack trace --------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_name", "data/none"], "data/none: no dataset here. Make it with: python data_prep/prepare_cctv.py"),
        (["--model_name_or_path", "models/none"], "models/none: no model here"),
        (["--model_name_or_path", "outputs/none"], "outputs/none: no run here. Training writes it"),
        (
            ["--config", "nowhere.yaml"],
            "nowhere.yaml: no such file. Recipes that come with the project, in scripts/configs:",
        ),
        (["--config", "llava_sample.yaml"], "no such file; did you mean scripts/configs/llava_sample.yaml? Recipes"),
        (["--lora_rank", "3"], "lora_rank"),
        (["--resume_from_checkpoint", "outputs/run/checkpoint-2"], "the same command continues a run"),
        (["--fsdp", "full_shard"], "fsdp has no effect here: accelerate launch --config_file accelerate_configs"),
        (["--use_peft"], "use_peft has no effect here: language_model, projector and vision_tower say what is lora"),
    ],
)
def test_a_mistake_is_one_sentence(flags, message, tiny_llava, monkeypatch, capsys):
    base = ["--config", str(SAMPLE)] if "--config" not in flags else []
    words = ["scripts/train_llava.py", *base, "--model_name_or_path", str(tiny_llava), *flags]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:  # and nothing else: whatever else is raised is a stack trace to the user
        runpy.run_path(words[0], run_name="__main__")
    assert ended.value.code and message in f"{capsys.readouterr().err}{ended.value.code}"


def test_an_unknown_key_of_a_recipe_is_an_error(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SAMPLE.read_text() + "\nlora_rank: 3\n")
    with pytest.raises(ValueError, match="lora_rank"):
        parse_arguments(SAMPLE, ["--config", str(recipe)])


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "scripts" / "configs").glob("llava_*.yaml")), ids=lambda path: path.name
)
def test_every_recipe_is_read(recipe):
    script_args, training_args, _ = parse_arguments(recipe, [])
    assert (
        script_args.language_model == "lora" and training_args.assistant_only_loss and training_args.max_length is None
    )


def test_the_t4_recipe_has_the_known_defaults():
    """Batch 8 without accumulation on one GPU; on more of them the batch a step stays 8."""
    recipe = yaml.safe_load((ROOT / "scripts" / "configs" / "llava_qlora.yaml").read_text())
    known = {
        "learning_rate": 1.4e-5, "per_device_train_batch_size": 8, "global_batch_size": 8, "num_train_epochs": 1,
        "gradient_checkpointing": True, "fp16": True, "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": True, "model_name_or_path": "llava-hf/llava-1.5-7b-hf", "dataset_name": "data/cctv",
    }  # fmt: skip
    assert known.items() <= recipe.items()


@pytest.mark.parametrize(
    ("asked", "capability", "chosen"),
    [
        ((False, None), (7, 5), (True, False)),
        ((False, None), (9, 0), (False, True)),
        ((True, None), (9, 0), (True, False)),
        ((True, None), None, (False, False)),
    ],
)
def test_precision_follows_the_gpu_unless_the_recipe_says(asked, capability, chosen):
    assert choose_precision(*asked, capability) == chosen


def test_bf16_is_refused_on_a_t4():
    with pytest.raises(ValueError, match=r"compute capability 7\.5 and bf16 needs 8\.0"):
        choose_precision(False, True, (7, 5))
