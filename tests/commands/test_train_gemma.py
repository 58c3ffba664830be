"""Training Gemma for real, on a tiny model: published numbers, template, packing, what moves and what is saved."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import train_gemma
import yaml
from accelerate import PartialState
from conftest import ROOT, SHARED, must_run
from datasets import Dataset, load_from_disk
from jinja2.exceptions import TemplateError
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer

from finetuning.arguments import parse_arguments
from finetuning.data.collator import stop_tokens
from finetuning.evaluation.perplexity import answer_losses
from finetuning.models.loading import load_base_model, load_for_inference
from finetuning.models.processing import CHAT_TEMPLATES, load_processing_class
from finetuning.training.trainer import FineTuningTrainer

CONFIGS = ROOT / "scripts" / "configs"
REAL_TOKENIZER = SHARED / "tokenizers" / "gemma-2b-it"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("anime")
    must_run("data_prep/make_sample_anime.py", "--output", folder / "anime.csv", "--titles", "20")
    must_run(
        *("data_prep/prepare_anime.py", "--csv", folder / "anime.csv", "--output", folder / "data"),
        *("--language", "ko", "--validation_share", "0.2", "--test_share", "0.2"),
    )
    return folder / "data"


def arguments(recipe: str, model: Path, dataset: Path, output: Path, *flags: str):
    common = ["--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", output]
    common += ["--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no", "--dataloader_num_workers", "0"]
    return parse_arguments(CONFIGS / recipe, [*map(str, common), *flags])


def test_the_known_recipe():
    _, training_args, model_args = parse_arguments(CONFIGS / "gemma_qlora.yaml", [])
    recipe = yaml.safe_load((CONFIGS / "gemma_qlora.yaml").read_text("utf-8"))
    assert recipe["fp16"] is True  # parsed here on a CPU, where precision is always fp32
    assert (model_args.load_in_4bit, model_args.bnb_4bit_quant_type, model_args.use_bnb_nested_quant) == (
        *(True, "nf4"),
        True,
    )
    assert (model_args.lora_r, model_args.lora_alpha, model_args.lora_dropout) == (64, 32, 0.05)
    assert model_args.lora_target_modules is None  # every linear layer of the decoder
    assert (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps) == (1, 4)
    assert (training_args.max_steps, training_args.learning_rate, training_args.warmup_steps) == (100, 2e-4, 0.03)
    assert training_args.optim == "paged_adamw_8bit"


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def real_tokenizer():
    if not REAL_TOKENIZER.is_dir():
        pytest.skip(f"the real Gemma tokenizer is not at {REAL_TOKENIZER}")
    return load_processing_class(str(REAL_TOKENIZER))


def test_the_template_is_gemmas_own_token_for_token(real_tokenizer):
    published = (REAL_TOKENIZER / "chat_template.jinja").read_text("utf-8")
    tokenizer = real_tokenizer
    assert len(tokenizer) == 256_000
    assert tokenizer.convert_tokens_to_ids(["<bos>", "<start_of_turn>", "<end_of_turn>"]) == [2, 106, 107]
    for messages in (
        conversation(" Who made it? ", "Sunrise.\n"),
        conversation("누가 만들었나요?", "선라이즈.", "몇 화?"),
    ):
        for prompt in (False, True):
            ours, theirs = (
                tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=prompt)
                for template in (None, published)
            )
            assert ours["input_ids"] == theirs["input_ids"]
            assert ours["input_ids"].count(2) == 1
            assert ours["input_ids"].count(106) == len(messages) + prompt


@pytest.mark.parametrize("which", ["tiny", "real"])
def test_the_answer_and_the_end_of_its_turn_are_supervised_and_nothing_else(which, tiny_gemma, request):
    tokenizer = load_processing_class(str(tiny_gemma)) if which == "tiny" else request.getfixturevalue("real_tokenizer")
    messages = conversation("Who made it?", "It was Sunrise.", "몇 화인가요?", "26화입니다.")
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    supervised = tokenizer.decode([token for token, marked in zip(ids, mask, strict=True) if marked])
    assert supervised == "It was Sunrise.<end_of_turn>26화입니다.<end_of_turn>"
    # What is asked in use is token for token what stands before the supervised span in training.
    prompt = tokenizer.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    last_answer = len(mask) - mask[::-1].index(1) - 1
    while mask[last_answer - 1]:
        last_answer -= 1
    assert ids[:last_answer] == prompt
    assert tokenizer.eos_token == "<end_of_turn>"
    assert set(tokenizer.convert_ids_to_tokens(stop_tokens(tokenizer))) == {"<end_of_turn>", "<eos>"}


def test_a_system_role_is_an_error_that_says_what_to_do(tiny_gemma):
    tokenizer = load_processing_class(str(tiny_gemma))
    with pytest.raises(TemplateError, match="no system role: put the instruction at the start of the first user"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be brief."}, *conversation("Hi")])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(attention, tiny_gemma, dataset, tmp_path):
    _, training_args, _ = arguments(
        *("gemma_lora.yaml", tiny_gemma, dataset, tmp_path, "--max_length", "256"),
        *("--per_device_train_batch_size", "2", "--gradient_checkpointing", "false"),
    )
    rows = load_from_disk(str(dataset))["train"].select_columns(["messages"]).select(range(8))
    model = load_base_model(str(tiny_gemma), dtype=torch.float32, attn_implementation=attention)
    tokenizer = load_processing_class(str(tiny_gemma))
    trainer = FineTuningTrainer(model=model, args=training_args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    num_packed = int((batch["position_ids"] == 0).sum())
    assert num_packed > 2  # two packed rows hold more than two rows
    packed_loss = trainer.compute_loss(model.eval(), dict(batch)).item()

    # The same rows, each alone: found by their tokens.
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    packed = [tuple(part.tolist()) for part in batch["input_ids"][0].tensor_split(starts[1:])]
    alone = {tuple(tokenizer.apply_chat_template(row["messages"])["input_ids"]): row["messages"] for row in rows}
    losses = answer_losses(model, tokenizer, [alone[ids] for ids in packed], batch_size=1)
    expected = sum(loss.total for loss in losses) / sum(loss.num_tokens for loss in losses)
    assert packed_loss == pytest.approx(expected, abs=2e-5)


def test_lora_moves_the_adapter_alone_and_the_folder_holds_all_that_is_needed(tiny_gemma, dataset, tmp_path):
    before = load_file(tiny_gemma / "model.safetensors")
    # The recipe for large GPUs, packed, as it is but for the model, the data and four steps.
    train_gemma.main(*arguments("gemma_lora.yaml", tiny_gemma, dataset, tmp_path / "run", "--max_length", "512"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *(
            "adapter_config.json",
            "adapter_model.safetensors",
            "arguments.yaml",
            "begun_with.json",
            "chat_template.jinja",
        ),
        *(
            "manifest.json",
            "metrics.json",
            "README.md",
            "progress.json",
            "runs",
            "tokenizer.json",
            "tokenizer_config.json",
            "trainer_state.json",
        ),
    }
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2  # A and B, seven linear layers, two blocks
    assert all(weights.abs().max() > 0 for name, weights in adapter.items() if "lora_B" in name)
    model, tokenizer = load_for_inference(str(tmp_path / "run"))
    assert isinstance(model, PeftModel)
    for name, weights in model.get_base_model().named_parameters():
        if "lora_" not in name:
            assert torch.equal(weights, before[name.replace(".base_layer", "")]), name
    assert tokenizer.chat_template == (CHAT_TEMPLATES / "gemma.jinja").read_text("utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path / "run").eos_token == "<end_of_turn>"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    assert metrics["completed"] is True
    assert metrics["global_step"] == 4


def test_qlora_trains_and_answers_facts_at_an_evaluation(tiny_gemma, dataset, tmp_path):
    # 4 bits and the paged optimizer of 8 bits on a CPU: the known recipe, four steps of it.
    flags = ["--eval_strategy", "steps", "--eval_steps", "4", "--eval_answers", "6", "--eval_max_new_tokens", "8"]
    train_gemma.main(
        *arguments("gemma_qlora.yaml", tiny_gemma, dataset, tmp_path / "run", *flags, "--optim", "adamw_torch")
    )
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text("utf-8"))["log_history"]
    scored = next(entry for entry in history if "eval_facts_right" in entry)
    assert scored["eval_facts_n"] == 6
    assert 0 <= scored["eval_facts_right"] <= 1


def test_the_first_process_tokenises_and_no_collective_waits_for_it(tiny_gemma, dataset, tmp_path, monkeypatch):
    """A collective would time out, and end the run, while the first process is still at a large dataset."""
    _, training_args, _ = arguments("gemma_lora.yaml", tiny_gemma, dataset, tmp_path)
    rows = load_from_disk(str(dataset))["train"].select_columns(["messages"]).select(range(2))
    by_collective, tokenise, waits = PartialState.wait_for_everyone, Dataset.map, []

    def watched(self, *args, **kwargs):
        waits.append(PartialState.wait_for_everyone is by_collective)
        return tokenise(self, *args, **kwargs)

    monkeypatch.setattr(Dataset, "map", watched)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        FineTuningTrainer(
            model=load_base_model(str(tiny_gemma), dtype=torch.float32), args=training_args, train_dataset=rows,
            processing_class=load_processing_class(str(tiny_gemma)),
        )  # fmt: skip
    finally:
        dist.destroy_process_group()
    assert waits and not any(waits)
    assert PartialState.wait_for_everyone is by_collective
