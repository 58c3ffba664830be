"""Secrets come from the environment: as flags or in recipes they are refused, and never said again."""

import pytest
from conftest import ROOT, run_here

SECRET = "hf_secretsecretsecretsecretsecret"
COMMANDS = sorted(path for folder in ("scripts", "data_prep") for path in (ROOT / folder).glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_no_command_takes_a_secret_as_a_flag_or_repeats_it(path, tmp_path):
    for words in ([f"--hf_token={SECRET}"], ["--wandb_api_key", SECRET]):
        result = run_here(str(path), *words, "--output", tmp_path / "out")
        assert result.returncode not in (0, None), result.stdout
        assert SECRET not in result.stdout + result.stderr
        assert words[0].partition("=")[0] in result.stderr
    assert not list(tmp_path.iterdir())
