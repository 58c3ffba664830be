"""Dockerfile and apptainer.def install the same, and what the README installs."""

import re

from conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
APPTAINER = (ROOT / "apptainer.def").read_text(encoding="utf-8")


def steps(text: str) -> dict[str, list[str]]:
    """The base, Debian's packages and requirements files of a build, in order."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.M).replace("\\\n", " ")
    return {
        "base": re.findall(r"^(?:FROM|From:) (\S+)$", text, re.M),
        "packages": re.findall(r"apt-get install --yes --no-install-recommends ([^&\n]+)", text)[0].split(),
        "environment": re.findall(r"python3\.11 -m venv (\S+)", text),
        "requirements": re.findall(r"-r (?:/opt/)?(requirements\S*\.txt)", text),
    }


def test_both_images_are_built_by_the_same_steps():
    found = steps(DOCKERFILE)
    assert found == steps(APPTAINER)
    assert found["environment"] == ["/opt/venv"] and len(found["packages"]) > 5
    assert found["requirements"] == ["requirements.txt", "requirements-serve.txt"]
    assert all((ROOT / name).is_file() for name in found["requirements"])


def test_no_image_carries_data_models_results_or_secrets():
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {"data", "models", "outputs", "wandb", ".git", ".env*"} <= set(ignored)
    kept = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split() if line[0] == "/"]
    assert all(
        name in ignored or f"{name}*" in ignored or f"{name}s" in ignored or name.startswith(".venv") for name in kept
    )
