"""The Dockerfile against the tree: what it copies is there and is all that the wheel is made of."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINES = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
COPIED = [
    source
    for line in LINES
    if line.startswith("COPY ") and "--from" not in line
    for source in line.removeprefix("COPY ").split()[:-1]
]


def test_all_that_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(COPIED) == kept
    assert [source for source in COPIED if not (ROOT / source).exists()] == []


def test_every_package_and_what_its_build_reads_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    needed = folders | {project["project"]["readme"], *project["project"]["license-files"], "pyproject.toml"}
    assert needed <= set(COPIED)


def test_it_runs_stagemesh_as_nobody_special() -> None:
    text = "\n".join(LINES)
    assert "ARG PYTHON_IMAGE=python:3.11-slim" in LINES
    assert re.findall(r"^FROM (\S+)", text, re.M) == ["${PYTHON_IMAGE}"] * 2
    last = text[text.rindex("FROM ") :]
    (user,) = re.findall(r"^USER (\d+):(\d+)$", last, re.M)
    values = (ROOT / "helm/stagemesh/values.yaml").read_text()
    assert f"runAsUser: {user[0]}" in values
    assert f"runAsGroup: {user[1]}" in values
    assert 'ENTRYPOINT ["stagemesh"]' in last
