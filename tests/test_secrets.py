"""Secrets come from the environment: as flags or in recipes they are refused, and never said again."""

import subprocess

import pytest
from conftest import ROOT, run_here

from finetuning.command_line import read_command

SECRET = "hf_secretsecretsecretsecretsecret"
COMMANDS = [path for folder in ("scripts", "data_prep") for path in sorted((ROOT / folder).glob("*.py"))]
COMMANDS = [path for path in COMMANDS if path.stem != "check_nodes"]  # only jobs run it
FIRST = {"check_recipe": ["scripts/train_llava.py", "cpu"]}  # words that a command needs before its flags


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_no_command_takes_a_secret_as_a_flag_or_repeats_it(path, tmp_path):
    for words in ([f"--hf_token={SECRET}"], ["--wandb_api_key", SECRET]):
        result = run_here(str(path), *FIRST.get(path.stem, []), *words, "--output", tmp_path / "out")
        assert result.returncode not in (0, None), result.stdout
        assert SECRET not in result.stdout + result.stderr
        assert words[0].partition("=")[0] in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_holds_no_secret(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"max_steps: 1\nenv:\n  HF_TOKEN: {SECRET}\n  TOKENIZERS_PARALLELISM: 'false'\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match=r"recipe\.yaml:2: env: HF_TOKEN: .*in the environment") as refused:
        read_command(recipe, [])
    assert SECRET not in str(refused.value)
    recipe.write_text("max_steps: 1\nenv:\n  TOKENIZERS_PARALLELISM: 'false'\n", encoding="utf-8")
    assert read_command(recipe, ["--model_name_or_path", "a", "--dataset_name", "b"])[1].max_steps == 1


def test_a_job_does_not_log_a_secret_among_its_flags():
    job = ["slurm/train.slurm", "scripts/train_llava.py", "single_gpu", "scripts/configs/llava_lora.yaml"]
    for words in (["--hub_token", SECRET], [f"--hub_token={SECRET}"]):
        ended = subprocess.run(["bash", *job, *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 2 and "--hub_token" in ended.stderr
        assert SECRET not in ended.stdout + ended.stderr
