"""What `accelerate launch` tells its processes."""

import pytest


def launch_by(monkeypatch: pytest.MonkeyPatch, how: str, **environment: str) -> None:
    """The environment that `accelerate launch` sets for a strategy."""
    environment["WORLD_SIZE"] = "1" if how == "one process" else "2"
    if how.startswith("ZeRO"):
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": how[-1]}
    if how.startswith("FSDP"):
        environment |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": how[-1]}
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
