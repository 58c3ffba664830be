"""What is uploaded of runs, models and datasets, against a stand-in for the Hub's HTTP interface."""

import io
import json
import shutil

import pyarrow.parquet
import pytest
from push_to_hub import files_to_upload, kind_of, main, parse_arguments

from finetuning.manifest import write_manifest
from finetuning.run_folder import files_of_result
from support.hub import Hub


@pytest.fixture
def hub(monkeypatch):
    server = Hub("hf_of_the_stand_in")
    for module in ("huggingface_hub.constants", "datasets.config"):
        name = "ENDPOINT" if module.startswith("hugging") else "HF_ENDPOINT"
        monkeypatch.setattr(f"{module}.{name}", server.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", server.endpoint, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", server.token)
    yield server
    server.shutdown()


@pytest.fixture
def run(tmp_path, tiny_llava):
    """A finished run with all that lies in one."""
    folder = tmp_path / "outputs" / "llava-run"
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "runs").mkdir()
    for name in ("adapter_model.safetensors", "checkpoint-4/optimizer.pt", "runs/events", "report.html"):
        (folder / name).write_bytes(b"x" * 100)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_llava)}))
    (folder / "arguments.yaml").write_text("dataset_name: data/cctv\n")
    (folder / "begun_with.json").write_text('{"directory": "/home/me/secret"}')
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# card\n")
    (folder / "metrics.json").write_text('{"completed": true}')
    write_manifest(folder, files_of_result(folder))
    return folder


def push(*words) -> None:
    main(parse_arguments([str(word) for word in words]))


def test_a_run_goes_up_private_without_checkpoints_trackers_pages_and_paths_of_this_machine(hub, run, capsys):
    push(run, "--repo_id", "me/people", "--dry_run")
    assert not hub.repos and "adapter_model.safetensors" in capsys.readouterr().out
    push(run, "--repo_id", "me/people")
    repo = hub.repos["models/me/people"]
    assert repo["private"] and repo["files"].keys() >= {path.name for path in files_to_upload(run, "run")}
    assert repo["files"].keys() - {".gitattributes"} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "arguments.yaml", "metrics.json",
    }  # fmt: skip
    assert repo["files"]["adapter_model.safetensors"] == b"x" * 100
    push(run, "--repo_id", "me/people")  # again: nothing is sent twice
    assert hub.uploads == 1


def test_an_upload_that_broke_goes_on(hub, run):
    (run / "model-2.safetensors").write_bytes(b"y" * 100)
    write_manifest(run, files_of_result(run))
    hub.fail_after = 1
    with pytest.raises(ValueError, match=r"me/people: .*507.*the same command goes on"):
        push(run, "--repo_id", "me/people")
    assert "model-2.safetensors" not in hub.repos["models/me/people"]["files"]
    push(run, "--repo_id", "me/people")
    assert hub.uploads == 2 and len(hub.repos["models/me/people"]["files"]) >= 6


def test_a_dataset_goes_up_as_parquet_with_its_pictures(hub, cctv_dataset):
    push(cctv_dataset, "--repo_id", "me/cctv")
    files = hub.repos["datasets/me/cctv"]["files"]
    assert json.loads(files["manifest.json"])["rows"]
    (train,) = (data for name, data in files.items() if name.startswith("data/train") and name.endswith(".parquet"))
    row = pyarrow.parquet.read_table(io.BytesIO(train)).slice(0, 1).to_pylist()[0]
    assert row["messages"] and row["images"][0]["bytes"][:2] == b"\xff\xd8"


def test_what_is_wrong_is_one_sentence(hub, run, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"neither a run .*; did you mean \S*llava-run\?"):
        kind_of(run.with_name("lava-run"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"^me/people: .*401"):
        push(run, "--repo_id", "me/people")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.repos["models/me/open"] = {"private": False, "files": {}}
    with pytest.raises(ValueError, match="is there already, and public"):
        push(run, "--repo_id", "me/open")
    (run / "adapter_model.safetensors").write_bytes(b"z" * 100)
    with pytest.raises(ValueError, match=r"not as it was written: adapter_model\.safetensors"):
        push(run, "--repo_id", "me/people")
    shutil.rmtree(run)
    (run / "checkpoint-1").mkdir(parents=True)
    (run / "arguments.yaml").write_text("a: 1\n")
    with pytest.raises(ValueError, match="training has not ended here"):
        push(run, "--repo_id", "me/people")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="no token: set HF_TOKEN"):
        push(make_model(tmp_path / "model"), "--repo_id", "me/people")


def make_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"w")
    return folder
