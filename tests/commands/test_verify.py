"""verify.py says what is whole and what is not."""

from conftest import run_here

from finetuning.manifest import write_manifest
from finetuning.run_folder import write_metrics


def test_runs_checkpoints_and_merged_models_are_read_file_by_file(tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    for folder in (run, run / "checkpoint-4", merged):
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"weights" * 999)
        write_manifest(folder, [folder / "adapter_model.safetensors"])
    write_metrics(run, {"completed": True})
    result = run_here("scripts/verify.py", run, merged)
    assert result.returncode == 0 and result.stdout.splitlines() == [
        f"{folder}: whole" for folder in (run / "checkpoint-4", run, merged)
    ]
    path = run / "checkpoint-4" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"S")
    (merged / "adapter_model.safetensors").unlink()
    result = run_here("scripts/verify.py", run, merged, tmp_path / "none")
    assert result.returncode == 1 and result.stdout.splitlines() == [
        f"{run / 'checkpoint-4'}: damaged",
        "  adapter_model.safetensors: changed since it was written",
        f"{run}: whole",
        f"{merged}: damaged",
        "  adapter_model.safetensors: missing",
        f"{tmp_path / 'none'}: no such folder",
    ]
