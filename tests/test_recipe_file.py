"""A recipe's mistakes are said with file, line and remedy, all of them together, and sound recipes pass."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from finetuning.arguments import parse_arguments
from finetuning.command_line import read_command

GIVEN = "model_name_or_path: models/tiny\ndataset_name: data/tiny\noutput_dir: outputs/try\n"
RECIPE = ROOT / "scripts" / "configs" / "llava_qlora.yaml"


def said(path: Path, text: str | bytes) -> list[str]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError) as caught:
        parse_arguments(RECIPE, ["--config", str(path)])
    return str(caught.value).replace(str(path), "R").splitlines()


# What stands from line 4 on -> all that is said of it.
MISTAKES = {
    "\tseed: 3": "R:4 begins with a tab, which YAML does not allow: use spaces",
    "learning_rate: 1.0e-4\n\tseed: 3": "R:5 begins with a tab, which YAML does not allow: use spaces",
    "lora_target_modules: [q_proj": "R:5 is not YAML: expected",
    "lora_r: 64.0": "R:4: lora_r: 64.0 is not a whole number: write 64",
    "max_length: 700.0": "R:4: max_length: 700.0 is not a whole number: write 700",
    "max_steps: 1.5": "R:4: max_steps: 1.5 is not a whole number",
    "eval_strategy: no": 'R:4: eval_strategy: no means false in YAML, expected one of no, steps, epoch: write "no" in quotes',
    "save_strategy: off": 'R:4: save_strategy: off means false in YAML, expected one of no, steps, epoch, best: write "no"',
    "report_to: no": 'R:4: report_to: no means false in YAML, write "none" in quotes',
    "report_to: off": 'R:4: report_to: off means false in YAML, write "none" in quotes',
    "seed: 010": "R:4: seed: 010 is read as 8: write the number that is meant",
    "max_steps: 1:30": "R:4: max_steps: 1:30 is read as 90: write the number that is meant",
    "seed: !!python/object:os.system 1": "R:4 is not YAML of plain values: could not determine a constructor",
    "eval_strategy: step": "R:4: eval_strategy: step is not one of no, steps, epoch; did you mean steps?",
    "seed: 3\nseed: 4": "R:5: seed stands in line 4 already: leave the one that is meant",
    "accelerator_config:\n  split_batches: true\n  split_batches: false": "R:6: split_batches stands in line 5 already",
    "lerning_rate: 1.0e-4": "R:4: lerning_rate is no setting; did you mean learning_rate?",
    "learning_rate: 0,0001": "R:4: learning_rate: 0,0001 is not a number",
    "learning_rate: true": "R:4: learning_rate: true means true in YAML, expected a number",
    "bf16: maybe": "R:4: bf16: maybe is not true or false",
    "seed: [3, 4]": "R:4: seed: expected one value, got a list of 2",
    "run_name: 2026-11-30": 'R:4: run_name: 2026-11-30 is read as date, expected text: write "2026-11-30" in quotes',
    "lora_target_modules: [q_proj, 3]": 'R:4: lora_target_modules: 3 is read as int, expected text: write "3" in quotes',
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_said_with_its_line_and_remedy(tmp_path, text):
    (line,) = said(tmp_path / "recipe.yaml", GIVEN + text + "\n")
    assert line.startswith(MISTAKES[text])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lora_r: 0", "lora_r: 0 is out of bounds: expected at least 1"),
        ("per_device_train_batch_size: 0", "expected at least 1"),
        ("global_batch_size: -8", "expected at least 1"),
        ("learning_rate: 0", "learning_rate: 0 is out of bounds: expected more than 0"),
        ("learning_rate: -1.0e-4", "expected more than 0"),
        ("lora_dropout: 1", "lora_dropout: 1 is out of bounds: expected less than 1"),
        ("weight_decay: -0.1", "expected at least 0"),
    ],
)
def test_numbers_that_no_training_can_have_are_refused(tmp_path, text, told):
    (line,) = said(tmp_path / "recipe.yaml", GIVEN + text + "\n")
    assert told in line


def test_all_mistakes_are_said_together(tmp_path):
    lines = said(
        tmp_path / "recipe.yaml", GIVEN + "lora_r: 8.0\nlerning_rate: 1\neval_strategy: no\nseed: 1\nseed: 2\n"
    )
    assert [line.partition(" ")[0] for line in lines] == ["R:8:", "R:4:", "R:5:", "R:6:"]


def test_files_that_are_no_recipe_are_named(tmp_path):
    korean = GIVEN.encode() + "# 학습률\nseed: 3\n".encode("cp949")
    (line,) = said(tmp_path / "recipe.yaml", korean)
    assert line == "R:4 is not UTF-8 (Korean Windows saves CP949): save the file as UTF-8"
    for text in ("", "- seed\n", "just words", "# nothing\n"):
        (line,) = said(tmp_path / "recipe.yaml", text)
        assert line.startswith("R: expected lines such as `learning_rate: 1.0e-4`")


def test_values_that_are_meant_well_pass(tmp_path):
    text = "learning_rate: 1e-4\neval_strategy: 'no'\nsave_steps: 500.0\nlogging_steps: 0.1\nbf16: null\nmax_length: null\n"
    text += (
        "checkpoint_layers: 8\ngradient_checkpointing_kwargs: {use_reentrant: false}\nlora_target_modules: all-linear\n"
    )
    (tmp_path / "recipe.yaml").write_text("\ufeff" + GIVEN + text, encoding="utf-8")
    script_args, training_args, _ = parse_arguments(RECIPE, ["--config", str(tmp_path / "recipe.yaml")])
    assert (script_args.checkpoint_layers, training_args.learning_rate) == ("8", 1e-4)
    assert training_args.eval_strategy == "no"


@pytest.mark.parametrize("recipe", sorted(RECIPE.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_read_without_pytorch(recipe):
    _, settings = read_command(RECIPE, ["--config", str(recipe)])
    assert settings.output_dir == yaml.safe_load(recipe.read_text(encoding="utf-8"))["output_dir"]
