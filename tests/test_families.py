"""Every family with pictures: audited, fused, trained, resumed, merged, on two processes; the real classes at toy size."""

import json

import pytest
import torch
import train_llava
from datasets import load_from_disk
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextVideoConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PaliGemmaConfig,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from finetuning.arguments import ModelArguments, ScriptArguments, parse_arguments
from finetuning.data.collator import LlavaDataCollator, with_pictures
from finetuning.data.label_audit import Auditor
from finetuning.data.shared_prefix import SharedPrefixCollator, group_by_image, uses_shared_prefix
from finetuning.distributed.empty_picture import see_an_empty_picture
from finetuning.families import dialogue_form, family_of, largest_picture, template_of
from finetuning.inference.generation import answer_batch, generate_answers
from finetuning.inference.packed_decoder import reason_against
from finetuning.inference.prompt_reader import bytes_of_fetch
from finetuning.kernels.lora_layers import FusedDecoderLayer, fuse_lora
from finetuning.kernels.model_patches import count_image_tokens_once, ignore_right_padding
from finetuning.kernels.shared_prefix_attention import enable_shared_prefix
from finetuning.model_shape import ModelShape
from finetuning.models.loading import load_base_model, load_for_inference
from finetuning.models.parts import count_parameters
from finetuning.models.picture_parameters import picture_parameters, without_adapter
from finetuning.models.processing import follow_tiles, load_config, load_processing_class
from finetuning.models.trainable import describe_trainable, set_trainable
from finetuning.preflight.planned_step import Training
from finetuning.preflight.planner import picture_cost, template_text
from finetuning.preflight.row_lengths import RowCounter, lengths_of, read_split
from finetuning.training.activation_checkpointing import with_largest_pictures
from support.families import CLIP_L_336, FAMILIES, dataset_of, in_two_processes, make, rows_of_all_shapes, which_half
from support.tiny_models import LANGUAGE_MODEL, assert_same, loss_and_grads, with_lora
from support.training import SAMPLE, assert_equal_adapters, folders, interrupted, merge_with_proof

# The towers of the published Gemma 3 and OneVision, but for the number of their layers.
SO400M = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param) / "base")


@pytest.fixture(scope="module")
def processor(folder):
    return load_processing_class(str(folder))


@pytest.fixture(scope="module")
def config(folder):
    return load_config(str(folder))


def random_model(folder):
    """Weights large enough that answers and losses differ from row to row."""
    model = load_base_model(str(folder), dtype=torch.float32)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".layers." in name and "norm" not in name and "vision" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_rows_of_every_shape_pass_the_audit_and_train(folder, processor, config):
    rows = [row | {"row": number} for number, row in enumerate(rows_of_all_shapes())]
    audits = Auditor(processor, config)(rows)
    assert {fault for audit in audits for fault in audit.faults if fault[0] != "blank_image"} == set()
    batch = LlavaDataCollator(processor, None, config)(rows)
    assert [audit.num_tokens for audit in audits] == batch["attention_mask"].sum(1).tolist()
    assert [audit.num_supervised for audit in audits] == (batch["labels"] != -100).sum(1).tolist()
    supervised = [processor.decode(labels[labels != -100]).removeprefix(" ") for labels in batch["labels"][[0, 1]]]
    end = processor.tokenizer.eos_token
    assert supervised == [f"Yes.{end}", f"No.{end}"]
    # Token for token, and pixel for pixel, what transformers' own processor makes of the rows.
    theirs = DataCollatorForVisionLanguageModeling(processor, max_length=None, assistant_only_loss=True).torch_call(
        [with_pictures(row) for row in rows]
    )
    assert batch.keys() - {"rows"} == theirs.keys() - {"num_crops"}
    for name in theirs.keys() - {"num_crops"}:
        assert torch.equal(torch.as_tensor(batch[name]), theirs[name]), name
    # The model counts the features of each row as the config says they are.
    model = load_base_model(str(folder), dtype=torch.float32)
    for row in rows:
        alone = LlavaDataCollator(processor, None, config)([row])
        alone.pop("rows")
        assert torch.isfinite(model(**alone).loss)


def test_a_plan_counts_its_parameters_and_the_tokens_of_its_rows(folder, processor, config, tmp_path):
    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = ModelShape.from_config(written)
    model = load_base_model(str(folder), dtype=torch.float32)
    assert shape.parameters == {part: count["total"] for part, count in count_parameters(model).items()}
    placement = dict.fromkeys(shape.parameters, "full")
    trained = set_trainable(model, ScriptArguments(dataset_name="x", **placement), ModelArguments())
    assert Training(shape, placement).trained == sum(part["trainable"] for part in count_parameters(trained).values())
    settings = {"chat_template_path": None, "image_tiles": None, "image_max_tiles": None}
    template, cost = template_text(settings, written, shape, folder), picture_cost(settings, written, shape)
    data = dataset_of(rows_of_all_shapes(), rows_of_all_shapes()[:1], tmp_path / "data")
    table = read_split(str(data), "train")
    counted = lengths_of(table, RowCounter(folder, template, cost), shares_prefix=False, folder=str(data)).counted
    batch = LlavaDataCollator(processor, None, config)(rows_of_all_shapes())
    assert [row.tokens for row in counted] == batch["attention_mask"].sum(1).tolist()
    assert [row.supervised for row in counted] == (batch["labels"] != -100).sum(1).tolist()
    family = family_of(config)
    sizes = [[(image.height, image.width) for image in row["images"]] for row in rows_of_all_shapes()]
    alone = [1 if family.several_as_views and len(row) > 1 else None for row in sizes]
    views = [sum(one or family.views(config, size) for size in row) for row, one in zip(sizes, alone, strict=True)]
    assert [row.pictures for row in counted] == views


def test_image_tokens_are_compared_row_by_row(processor, config):
    if "image_sizes" not in family_of(config).picture_inputs:
        pytest.skip("every picture has as many tokens")
    rows = [row | {"row": 70 + number} for number, row in enumerate(rows_of_all_shapes()[:4])]
    collator = LlavaDataCollator(processor, None, config)
    batch = collator(rows)
    batch["image_sizes"][0], batch["image_sizes"][3] = batch["image_sizes"][3], batch["image_sizes"][0]
    with pytest.raises(ValueError, match="are not those of the rows' pictures"):
        collator.refuse_other_features(batch, rows)
    # The totals are right, the rows are not.
    batch = collator(rows)
    batch["input_ids"] = batch["input_ids"][[3, 1, 2, 0]]
    with pytest.raises(ValueError, match=r"row 70: \d+ image tokens, and the model makes \d+ features"):
        collator.refuse_other_features(batch, rows)


def test_a_probe_of_memory_has_the_pictures_of_most_tokens(processor, config):
    size, rows = largest_picture(config), rows_of_all_shapes()
    probe = with_largest_pictures(rows, size)
    tokens = LlavaDataCollator(processor, None, config)(probe)["attention_mask"].sum(1)
    others = LlavaDataCollator(processor, None, config)(rows)["attention_mask"].sum(1)
    assert [len(row["images"]) for row in probe] == [len(row["images"]) for row in rows]
    assert (tokens >= others).all() and (size is None or (tokens[:8] > others[:8]).any())


def test_loader_processes_leave_room_for_all_tiles(processor, config):
    size = largest_picture(config)
    tiles = 0 if size is None else max(h * w for h, w in config.image_grid_pinpoints) // 32**2
    assert bytes_of_fetch(processor) == 4 * (1 + tiles) * 3 * 32 * 32 * 4


@pytest.mark.parametrize("projector", ["full", "lora"])
def test_vectors_beside_the_projector_are_trained_with_it_or_said_to_stay(projector, folder):
    script_args = ScriptArguments(dataset_name="x", projector=projector, vision_tower="frozen")
    base = random_model(folder)
    names = list(picture_parameters(base))
    if projector == "lora" and not any("multi_modal_projector" in n and "linear" in n for n, _ in base.named_modules()):
        pytest.skip("the projector has no linear layer for LoRA")
    model = set_trainable(base, script_args, ModelArguments(lora_r=4))
    trained = picture_parameters(model, trained=True)
    assert len(trained) == (len(names) if projector == "full" else 0)
    assert ("image_newline stays as it is: LoRA adapts matrices" in describe_trainable(model)) == (
        projector == "lora" and bool(names)
    )


@pytest.mark.parametrize("how", [{}, {"use_dora": True, "use_rslora": True}], ids=["LoRA", "rsLoRA and DoRA"])
def test_fused_lora_is_pefts_and_the_patches_change_nothing(how, folder, processor, config):
    rows = rows_of_all_shapes()
    batch = LlavaDataCollator(processor, None, config)(rows)
    model = with_lora(random_model(folder), LANGUAGE_MODEL, modules_to_save=["multi_modal_projector"], **how).train()
    expected = loss_and_grads(model, batch)
    assert fuse_lora(model) == 14
    whole_layers = sum(isinstance(module, FusedDecoderLayer) for module in model.modules())
    assert whole_layers == 2
    ignore_right_padding(model)
    count_image_tokens_once(model)
    for _ in range(2):  # the second does not count again
        assert_same(loss_and_grads(model, batch), expected)


def test_dialogues_about_a_picture_share_it(folder, processor, config, tmp_path):
    rows = load_from_disk(dataset_of(rows_of_all_shapes(), rows_of_all_shapes()[:1], tmp_path / "data"))["train"]
    script_args = ScriptArguments(dataset_name="x")
    assert uses_shared_prefix(script_args, rows, config) == family_of(config).shares_prefix
    if not family_of(config).shares_prefix:
        script_args.share_image_prefix = True
        with pytest.raises(ValueError, match="the image tokens of gemma3 see one another"):
            uses_shared_prefix(script_args, rows, config)
        return
    alone = LlavaDataCollator(processor, None, config)(list(rows.select([0, 8])))
    model = with_lora(random_model(folder), LANGUAGE_MODEL).train()
    expected = loss_and_grads(model, alone)
    shared = SharedPrefixCollator(processor, None, config)([group_by_image(rows.select([0, 8]))[0]])
    shared.pop("rows")
    assert len(shared["pixel_values"]) == 1
    fuse_lora(model)
    enable_shared_prefix(model)
    assert_same(loss_and_grads(model, shared), expected)


def test_a_batch_without_pictures_sees_an_empty_one_and_learns_the_same(folder, processor, config):
    batch = LlavaDataCollator(processor, None, config)([rows_of_all_shapes()[-1]])
    assert "pixel_values" not in batch
    model = with_lora(random_model(folder), LANGUAGE_MODEL, modules_to_save=["multi_modal_projector"]).train()
    loss, grads = loss_and_grads(model, batch)
    assert not any("projector" in name for name in grads)
    see_an_empty_picture(model)
    seen_loss, seen_grads = loss_and_grads(model, batch)
    of_projector = {name: seen_grads.pop(name) for name in list(seen_grads) if "projector" in name}
    assert of_projector and not any(grad.any() for grad in of_projector.values())
    assert_same((seen_loss, seen_grads), (loss, grads))
    # Where there is a picture, nothing changes.
    seen = LlavaDataCollator(processor, None, config)([rows_of_all_shapes()[0]])
    assert any(grad.any() for name, grad in loss_and_grads(model, seen)[1].items() if "projector" in name)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True], ids=["base", "adapter"])
def test_answers_are_those_of_generate_one_row_at_a_time(adapter, folder, processor):
    model = random_model(folder).eval().requires_grad_(False)
    if adapter:
        model = with_lora(model, LANGUAGE_MODEL).eval().requires_grad_(False)
    rows = [row | {"messages": row["messages"][:-1]} for row in rows_of_all_shapes()]
    expected = [answer_batch(model, processor, [row], max_new_tokens=8)[0] for row in rows]
    assert len(set(expected)) > 3
    assert generate_answers(model, processor, rows, batch_size="auto", max_new_tokens=8) == expected
    assert (reason_against(model) is None) == (processor.__class__.__name__ != "Gemma3Processor")  # packed, but Gemma 3


def train(model, dataset, output, *flags: str):
    train_llava.main(*parse_arguments(SAMPLE, [
        *folders(model, dataset, output),
        *("--eval_strategy", "no", "--save_strategy", "no", "--eval_answers", "0", *flags),
    ]))  # fmt: skip
    return output


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return which_half(tmp_path_factory.mktemp("data") / "halves")


@pytest.fixture(scope="module")
def trained(folder, dataset, tmp_path_factory):
    """The base, trained in full for a minute on which half is brighter."""
    return train(
        *(folder, dataset, tmp_path_factory.mktemp("trained") / folder.parent.name),
        *("--language_model", "full", "--vision_tower", "full", "--max_steps", "60", "--learning_rate", "3e-3"),
        *("--per_device_train_batch_size", "16"),
    )


@pytest.mark.slow
def test_it_learns_what_pictures_show(trained, dataset, folder):
    model, processor = load_for_inference(str(trained))
    rows = load_from_disk(dataset)["validation"]
    asked = [{"messages": row["messages"][:1], "images": row["images"]} for row in rows]
    answers = generate_answers(model, processor, asked, max_new_tokens=4)
    right = sum(answer == row["messages"][1]["content"] for answer, row in zip(answers, rows, strict=True))
    assert right >= 0.95 * len(rows)
    # What lies beside the projector and is trained with it is in the file.
    weights, before = load_file(trained / "model.safetensors"), load_file(folder / "model.safetensors")
    assert count_parameters(model)["projector"]["total"] == sum(
        tensor.numel() for name, tensor in weights.items() if "multi_modal_projector" in name or "image_newline" in name
    )
    for name, tensor in weights.items():
        if "image_newline" in name or "multi_modal_projector" in name:
            assert not torch.equal(tensor, before[name]), name


@pytest.mark.slow
def test_fewer_tiles_are_what_processor_model_and_audit_agree_on(folder, config, dataset, tmp_path):
    if "image_sizes" not in family_of(config).picture_inputs:
        with pytest.raises(ValueError, match="sees a picture in one view: remove it"):
            load_processing_class(str(folder), image_max_tiles=2)
        return
    run = train(folder, dataset, tmp_path / "run", *LORA, "--max_steps", "1", "--image_max_tiles", "2")
    model, processor = load_for_inference(str(run))
    rows = rows_of_all_shapes()
    follow_tiles(config := load_config(str(folder)), processor)
    few = [audit.num_tokens for audit in Auditor(processor, config)(rows)]
    all_of_them = [
        audit.num_tokens for audit in Auditor(load_processing_class(str(folder)), load_config(str(folder)))(rows)
    ]
    assert sum(few) < sum(all_of_them)
    for row in rows:
        asked = row | {"messages": row["messages"][:-1]}
        assert isinstance(answer_batch(model, processor, [asked], max_new_tokens=2)[0], str)
    with pytest.raises(ValueError, match=r"image_max_tiles: 0, but the smallest grid of llava_.* has"):
        load_processing_class(str(folder), image_max_tiles=0)


LORA = (
    *("--lora_r", "4", "--lora_alpha", "8", "--max_steps", "4", "--logging_steps", "1", "--global_batch_size", "4"),
    *("--per_device_train_batch_size", "4", "--vision_tower", "frozen", "--lr_scheduler_type", "constant"),
)
SAVED = ("--save_strategy", "steps", "--save_steps", "2")


@pytest.fixture(scope="module")
def run(trained, dataset, tmp_path_factory):
    return train(trained, dataset, tmp_path_factory.mktemp("lora") / trained.name, *LORA, *SAVED)


@pytest.mark.slow
def test_the_adapter_holds_all_of_the_projector_and_is_off_without_it(run, trained, dataset):
    base, _ = load_for_inference(str(trained))
    model, processor = load_for_inference(str(run))
    saved = load_file(run / "adapter_model.safetensors")
    for name, parameter in picture_parameters(base).items():
        assert not torch.equal(saved[f"base_model.model.{name}"], parameter)
    batch = dict(LlavaDataCollator(processor)([load_from_disk(dataset)["validation"][0]]))
    with torch.no_grad():
        tuned, expected = model(**batch).logits, base(**batch).logits
        assert not torch.equal(tuned, expected)
        with without_adapter(model):
            assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model(**batch).logits, tuned)
        # PEFT's own loader reads the same.
        theirs = PeftModel.from_pretrained(load_base_model(str(trained), dtype=torch.float32), run).eval()
        torch.testing.assert_close(theirs(**batch).logits, tuned, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_ends_at_the_same_bits_and_merges_with_proof(run, trained, dataset, tmp_path):
    again = train(trained, dataset, interrupted(run, tmp_path / "again"), *LORA, *SAVED)
    assert json.loads((again / "trainer_state.json").read_text())["global_step"] == 4
    assert_equal_adapters(again, run)
    assert merge_with_proof(run, tmp_path / "merged")["merged_against_tuned"]["mean_kl"] < 1e-6


@pytest.mark.slow
def test_two_processes_train_what_one_trains(run, trained, dataset, tmp_path):
    two = tmp_path / "two"
    in_two_processes(lambda: train(trained, dataset, two, *LORA, "--per_device_train_batch_size", "2"))
    state = json.loads((two / "trainer_state.json").read_text())
    expected = json.loads((run / "trainer_state.json").read_text())
    for key in ("loss", "grad_norm"):
        assert [log[key] for log in state["log_history"] if key in log] == pytest.approx(
            [log[key] for log in expected["log_history"] if key in log], abs=1e-5, rel=1e-5
        )
    weights, expected = (load_file(each / "adapter_model.safetensors") for each in (two, run))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("text_config", "supervised", "between"),
    [
        ({"model_type": "mistral"}, "No.</s>", "</s> [INST] How many people? [/INST]"),
        (
            {"vocab_size": 128_256},
            "No.<|eot_id|>",
            "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHow many people?<|eot_id|>",
        ),
    ],
    ids=["mistral", "llama3"],
)
def test_llava_around_other_language_models_writes_their_dialogues(
    text_config, supervised, between, tiny_llava, tmp_path
):
    processor = load_processing_class(str(tiny_llava))
    processor.tokenizer.add_tokens(["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], special_tokens=True)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tiny_llava / "config.json").read_text())
    settings["text_config"] |= text_config
    (tmp_path / "config.json").write_text(json.dumps(settings))
    processor, config = load_processing_class(str(tmp_path)), load_config(str(tmp_path))
    rows = rows_of_all_shapes()
    assert {
        fault for audit in Auditor(processor, config)(rows) for fault in audit.faults if fault[0] != "blank_image"
    } == set()
    batch = LlavaDataCollator(processor, None, config)(rows)
    assert processor.decode(batch["labels"][1][batch["labels"][1] != -100]).strip() == supervised
    assert between in processor.decode(batch["input_ids"][8])


def test_a_language_model_whose_dialogues_are_not_known_is_refused():
    config = LlavaNextConfig(vision_config=CLIP_L_336, text_config=LlamaConfig(vocab_size=64_064))
    with pytest.raises(ValueError, match=r"llama with 64,064 tokens: .* give its form with --chat_template_path"):
        dialogue_form(config)
    config = LlavaConfig(vision_config=CLIP_L_336, text_config=Qwen2Config())
    with pytest.raises(ValueError, match="llava around a language model of type qwen2 is not known here, only around"):
        template_of(config)
    config = LlavaConfig(vision_config=PixtralVisionConfig(), text_config=MistralConfig())
    with pytest.raises(ValueError, match="llava with a vision tower of type pixtral is not known here"):
        family_of(config)


@pytest.mark.parametrize(
    ("config", "nearest"),
    [(Qwen2_5_VLConfig, "llava_onevision"), (PaliGemmaConfig, "gemma3"), (LlavaNextVideoConfig, "llava_next")],
)
def test_a_family_that_is_not_known_is_told_the_nearest(config, nearest):
    with pytest.raises(
        ValueError, match=rf"{config.model_type} are not known here: .* The nearest to it is {nearest};"
    ):
        family_of(config())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "form", "parameters"),
    [
        (
            LlavaNextConfig(vision_config=CLIP_L_336, text_config=MistralConfig(vocab_size=32064, sliding_window=None)),
            "mistral",
            7_566_747_648,
        ),
        (LlavaConfig(vision_config=CLIP_L_336, text_config=LlamaConfig(vocab_size=32064)), "vicuna", 7_063_427_072),
        (
            LlavaConfig(
                vision_config=CLIP_L_336,
                text_config=LlamaConfig(
                    vocab_size=32064,
                    hidden_size=5120,
                    intermediate_size=13824,
                    num_hidden_layers=40,
                    num_attention_heads=40,
                ),
            ),
            "vicuna",
            13_351_494_656,
        ),
        (
            LlavaNextConfig(vision_config=CLIP_L_336, text_config=LlamaConfig(vocab_size=32064)),
            "vicuna",
            7_063_431_168,
        ),
        (
            Gemma3Config(
                text_config=Gemma3TextConfig(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34),
                vision_config=SiglipVisionConfig(**SO400M, num_hidden_layers=27, image_size=896),
            ),
            "gemma",
            4_300_079_472,
        ),
        (
            LlavaOnevisionConfig(
                text_config=Qwen2Config(
                    **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "vocab_size": 152_064},
                    **{"num_attention_heads": 28, "num_key_value_heads": 4},
                ),
                vision_config=SiglipVisionConfig(**SO400M, num_hidden_layers=26, image_size=384),
            ),
            "chatml",
            8_030_348_832,
        ),
    ],
    ids=[
        "llava-v1.6-mistral-7b",
        "llava-1.5-7b",
        "llava-1.5-13b",
        "llava-v1.6-vicuna-7b",
        "gemma-3-4b-it",
        "llava-onevision-qwen2-7b-ov",
    ],
)
def test_published_shapes_have_their_published_sizes(config, form, parameters):
    assert dialogue_form(config) == form
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    counts = count_parameters(model)
    assert sum(part["total"] for part in counts.values()) == parameters
    shape = ModelShape.from_config(config.to_dict())
    assert shape.parameters == {part: count["total"] for part, count in counts.items()}
