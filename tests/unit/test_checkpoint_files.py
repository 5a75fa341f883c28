"""Files that a worker loads: where they are, and that they are the same before and after a load."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from stagemesh import checkpoint
from stagemesh.errors import CheckpointError, ConfigError, Unavailable
from stagemesh.gateway.text.tokenizer import Tokenizer
from stagemesh.generation import generation_config
from stagemesh.protos.v1 import stage_pb2, types_pb2
from stagemesh.settings.model import DEMO_MODEL
from stagemesh.settings.stage import StageSettings
from stagemesh.stage_worker.agent.files import CheckpointFiles
from stagemesh.stage_worker.timing import StageTiming

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def request(**model: object) -> stage_pb2.AssignRequest:
    layers = types_pb2.LayerRange(first=0, last=2)
    return stage_pb2.AssignRequest(model=types_pb2.ModelRef(num_layers=8, **model), layers=layers)  # type: ignore[arg-type]


def files(**settings: object) -> CheckpointFiles:
    return CheckpointFiles(StageSettings(**settings), MagicMock(), StageTiming())  # type: ignore[arg-type]


def replace(file: Path) -> None:
    """As a download does: another file of the same content takes its place."""
    other = file.with_suffix(".other")
    shutil.copyfile(file, other)
    other.replace(file)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda file: os.truncate(file, 1000)),
        ("model.safetensors", replace),
        ("model.safetensors", Path.unlink),
        ("config.json", lambda file: file.write_text("{}")),
    ],
    ids=["cut", "replaced", "removed", "config"],
)
def test_a_file_that_changes_during_a_load_is_named(folder: Path, name: str, change: Callable[[Path], None]) -> None:
    async def go() -> None:
        found, asked = files(), request(path=str(folder))
        before = await found.find(asked, lambda here, total: None)
        first = found.order(asked)
        await found.check_unchanged(before)
        assert found.order(asked) == first == asked
        change(folder / name)
        with pytest.raises(Unavailable, match=f"{name} was changed while it was loaded"):
            await found.check_unchanged(before)
        assert found.order(asked).model.fingerprint != first.model.fingerprint, "ranks do not use those weights again"

    asyncio.run(go())


@pytest.mark.parametrize(
    ("told", "theirs"),
    [
        (str(DEMO_MODEL), {"repo": "org/name", "commit": COMMIT}),
        ("org/name", {"path": str(DEMO_MODEL)}),
        (f"org/name@{COMMIT[::-1]}", {"repo": "org/name", "commit": COMMIT}),
    ],
)
def test_a_worker_with_another_kind_of_model_is_told_before_it_loads(told: str, theirs: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is not the coordinator's"):
        asyncio.run(files(model=told).find(request(**theirs), lambda here, total: None))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n"
PAGE = b"\n<!doctype html>\n<html><body>Too many requests</body></html>"


@pytest.mark.parametrize(("data", "says"), [(POINTER, "is a Git LFS pointer"), (PAGE, "is a web page")])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", checkpoint.inspect),
        ("model.safetensors", checkpoint.inspect),
        ("model.safetensors", checkpoint.fingerprint),
        ("generation_config.json", generation_config),
        ("tokenizer.json", Tokenizer),
        ("tokenizer_config.json", Tokenizer),
        ("chat_template.jinja", Tokenizer),
    ],
)
def test_what_was_not_downloaded_is_named(
    folder: Path, name: str, read: Callable[[Path], object], data: bytes, says: str
) -> None:
    (folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{name} {says}.*download it again"):
        read(folder)


def test_nobody_imports_huggingface_hub_to_serve_a_folder() -> None:
    """It would take a tenth of a second of each start, and transformers of ranks that need it imports it anyway."""
    code = """
import sys
from stagemesh.cli.service import SERVICES, run_function, settings_class
for name in SERVICES:
    run_function(name), settings_class(name)
import stagemesh.stage_worker.agent.files, stagemesh.cli.main
from stagemesh.coordinator.build import build
from stagemesh.settings.coordinator import CoordinatorSettings
build(CoordinatorSettings())
print([name for name in ("huggingface_hub", "httpx", "httpx2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
