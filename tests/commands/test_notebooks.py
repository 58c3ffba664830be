"""The notebooks run to their end on the small model, say the same in both languages, and use flags that exist.

`make test-notebooks` runs all four; elsewhere the English LLaVA notebook stands for them.
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ENGLISH = [path for path in NOTEBOOKS if not path.name.endswith(".ko.ipynb")]
EXECUTED = NOTEBOOKS if os.environ.get("NOTEBOOKS") == "all" else [ROOT / "notebooks" / "llava_colab.ipynb"]


def code_of(path: Path) -> list[str]:
    """Code cells without comments, and without the words that are in the notebook's language."""
    cells = [
        cell["source"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"
    ]
    code = ["".join(source) if isinstance(source, list) else source for source in cells]
    return [re.sub(r'  # .*|--question "[^"]*"|--language \w+|assert REPOSITORY, ".*"', "", text) for text in code]


def test_all_notebooks_are_here():
    assert [path.name for path in NOTEBOOKS] == [
        *("gemma_colab.ipynb", "gemma_colab.ko.ipynb", "llava_colab.ipynb", "llava_colab.ko.ipynb")
    ]


@pytest.mark.parametrize("path", ENGLISH, ids=lambda path: path.stem)
def test_both_languages_run_the_same(path):
    korean = path.with_name(path.name.replace(".ipynb", ".ko.ipynb"))
    ours, theirs = code_of(path), code_of(korean)
    assert [re.sub(r"\s+\n", "\n", text).strip() for text in ours] == [
        re.sub(r"\s+\n", "\n", text).strip() for text in theirs
    ]
    shapes = [[cell.cell_type for cell in nbformat.read(one, 4).cells] for one in (path, korean)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs_and_check_each_command(path):
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
            for line in cell.source.splitlines():
                if re.match(r"\s*!(python|accelerate) ", line):
                    script = next(word for word in shlex.split(line) if word.endswith(".py"))
                    assert (ROOT / script).is_file() and "_exit_code == 0" in cell.source


@pytest.mark.parametrize("path", EXECUTED, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path, tmp_path, monkeypatch):
    monkeypatch.setenv("WORK", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    notebook = nbformat.read(path, 4)
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    kind = path.name.partition("_")[0]
    run = tmp_path / "outputs" / f"{kind}-colab"
    assert (run / "adapter_model.safetensors").is_file() or (run / "model.safetensors").is_file()
    assert (tmp_path / "adapter.zip").is_file()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    page = next(output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    assert page.startswith("<iframe srcdoc=") and "&lt;table" in page
    if kind == "llava":
        assert any("image/jpeg" in output.get("data", {}) for output in outputs)
        assert (tmp_path / "models" / "llava-merged" / "merge_report.json").is_file()
