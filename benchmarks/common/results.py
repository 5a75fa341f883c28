"""Writes results: JSON for tools, Markdown for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .facts import ROOT, machine, own_versions, today

RESULTS = ROOT / "benchmarks" / "results"


def origin(command: str) -> dict[str, Any]:
    """Returns the origin of a result. `command` follows `python -m benchmarks.` on the command line."""
    versions = own_versions()
    return {"date": today(), "machine": machine(), "versions": versions, "command": f"python -m benchmarks.{command}"}


def save(stem: Path, whole: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Writes `stem`.json and `stem`.md, and prints the page."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    page = "\n".join(lines) + "\n"
    stem.with_name(stem.name + ".md").write_text(page, encoding="utf-8")
    print(page)


def machine_line(found: Mapping[str, Any]) -> str:
    """Returns the machine as an item of a Markdown list."""
    return (
        f"- Machine: {found['cores']} cores, {found['cpu']}, {found['memory_gib']:.0f} GiB; "
        f"of its instructions: {', '.join(found['cpu_flags']) or 'none of those looked for'}."
    )
