"""The job files: valid shell, no site in them, and the grid of a sweep."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sweep
import yaml
from conftest import ROOT, run_command, run_here

from finetuning.arguments import parse_arguments

SLURM = ROOT / "slurm"
FILES = sorted([*SLURM.glob("*.slurm"), *SLURM.glob("*.sh"), *(ROOT / "tests" / "cluster").glob("*.sh")])
SWEEP = ("scripts/train_llava.py", "ddp", "scripts/configs/llava_lora.yaml", "slurm/sweep_llava.yaml")


def test_the_job_files_are_there():
    assert {path.name for path in FILES} == {
        "chain.sh", "cluster.sh", "environment.sh", "evaluate.slurm", "on_each_node.sh", "prepare.slurm", "submit.sh",
        "sweep.slurm", "train.slurm",
    }  # fmt: skip
    assert (SLURM / "logs").is_dir()  # sbatch does not make the folder of its logs


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_bash_and_shellcheck_have_nothing_to_say(path):
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    result = subprocess.run([shellcheck, "-x", path.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.slurm")), ids=lambda path: path.name)
def test_a_job_file_names_no_site_and_no_number_of_nodes_that_is_not_its_own(path):
    directives = re.findall(r"^#SBATCH --(\S+?)(?:=|$)", path.read_text(), re.MULTILINE)
    assert {"job-name", "output"} <= set(directives)
    site = {"partition", "account", "qos", "gres", "gpus", "gpus-per-node", "constraint", "time", "mem", "mail-user"}
    assert not site & set(directives)
    assert ("nodes" in directives) == (path.name in ("prepare.slurm", "evaluate.slurm"))
    assert "set -euo pipefail" in path.read_text() and 'cd "$SLURM_SUBMIT_DIR"' in path.read_text()


def test_the_node_rank_is_expanded_on_the_node_and_nowhere_else():
    assert {path.name for path in FILES if re.search(r"\$\{?SLURM_(NODEID|PROCID)", path.read_text())} == {
        "on_each_node.sh"
    }


def test_a_sweep_has_every_combination_in_a_folder_of_its_own():
    lines = run_here("scripts/sweep.py", *SWEEP, "--num_train_epochs", "2").stdout.splitlines()
    assert len(lines) == 9
    assert lines[1] == (
        "1: scripts/configs/llava_lora.yaml --num_train_epochs 2 --learning_rate 1e-05 --lora_r 64 "
        "--output_dir outputs/llava-lora/learning_rate=1e-05,lora_r=64"
    )
    words = run_command("scripts/sweep.py", *SWEEP, "--point", "8", "--output_dir", "elsewhere").stdout.splitlines()
    assert words[:3] == list(SWEEP[:3]) and words[-1] == "elsewhere/learning_rate=5e-05,lora_r=128"
    assert run_command("scripts/sweep.py", *SWEEP, "--point", "9").stderr == (
        "sweep.py: slurm/sweep_llava.yaml has points 0 to 8, not 9\n"
    )


def test_a_grid_with_a_key_that_no_recipe_has_is_refused_with_every_point(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("lora_rank: [3, 4]\n")
    result = run_here("scripts/sweep.py", *SWEEP[:3], grid, "--count")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "point 0: " in result.stderr and "point 1: " in result.stderr and "lora_rank" in result.stderr


def test_all_mistakes_of_a_submission_are_told_at_once():
    words = ("scripts/train_lava.py", "dpd", "--config", "scripts/configs/llava_lora.yaml", "--lora_rank", "16")
    result = run_here("scripts/check_recipe.py", *words)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for part in ("scripts/train_lava.py: no training command", "dpd: no strategy", "--lora_rank"):
        assert part in result.stderr


def test_points_of_a_sweep_never_share_a_folder(tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "model_name_or_path: [a/b, a_b, a b, 'a,b=c', a%2Fb]\nlora_target_modules: [[q_proj, v_proj], 'q_proj,v_proj']"
    )
    points = sweep.read_grid(grid)
    words = [sweep.words_of(point, "recipe", "runs", []) for point in points]
    folders = {line[-1] for line in words}
    assert len(folders) == len(points) == 10 and not sweep.folder_problems(words)
    assert "runs/model_name_or_path=a%2Fb,lora_target_modules=[q_proj,v_proj]" in folders
    same = [sweep.words_of({"seed": seed}, "recipe", "runs", []) for seed in (1, "1", 2)]
    assert sweep.folder_problems(same) == ["points 0 and 1 are the same run: runs/seed=1"]
    long = [sweep.words_of({"model_name_or_path": "m" * 300}, "recipe", "runs", [])]
    assert "a folder's name of 319 characters" in sweep.folder_problems(long)[0]


def submit(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    """submit.sh with an sbatch that prints its words, and a check of the recipe that finds nothing."""
    for name, line in (("sbatch", 'echo "$@"'), ("python", "true")):
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    (folder / "environment.sh").write_text("PREFIX=()\n")
    environment = os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "ENVIRONMENT_FILE": str(folder / "environment.sh"),
    }
    environment.pop("SBATCH_TIMELIMIT", None)
    words = ("bash", "slurm/submit.sh", *flags, "slurm/train.slurm", *SWEEP[:3])
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("flags", "signal"),
    [
        (["--time=6"], "--signal=B:USR2@120"),
        (["--time", "5:00"], "--signal=B:USR2@100"),
        (["-t", "0:14:30"], "--signal=B:USR2@290"),
        (["-t10"], "--signal=B:USR2@200"),
        (["--time=0-0:10"], "--signal=B:USR2@200"),
        (["--time=15"], None),
        (["--time=1-0"], None),
        (["--time=UNLIMITED"], None),
        ([], None),
        (["--time=10", "--signal=B:USR2@60"], None),
    ],
)
def test_a_short_job_is_warned_a_third_of_its_time_before_its_end(tmp_path, flags, signal):
    result = submit(tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [*flags, *([signal] if signal else []), "slurm/train.slurm", *SWEEP[:3]]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--time=2"], "--time 2 is too short"),
        (["-t", "10:00", "--signal", "B:USR2@300"], "warns 300 s before the end of a job of 600 s: 200 at most"),
    ],
)
def test_a_job_that_would_only_be_warned_is_refused(tmp_path, flags, problem):
    result = submit(tmp_path, *flags)
    assert result.returncode == 2 and problem in result.stderr and not result.stdout


def test_the_wandb_sweep_varies_keys_of_its_recipe_and_scores_what_is_logged():
    sweep = yaml.safe_load((SLURM / "wandb_sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "eval/score", "goal": "maximize"}
    shell = sweep["command"][2]
    recipe = re.search(r"--config (\S+)", shell)[1]
    flags = [word for key in sweep["parameters"] for word in (f"--{key}", "1")]
    parse_arguments(ROOT / recipe, ["--config", str(ROOT / recipe), *flags])
    assert (
        "--output_dir outputs/wandb-sweep/$WANDB_RUN_ID" in shell and sweep["command"][-1] == "${args_no_boolean_flags}"
    )
