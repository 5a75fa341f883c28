"""Writes the result of a long test suite to `results/NAME.md`.

    python -m benchmarks.suite_result NAME JUNIT COMMAND

`make chaos` and `make numerics` call it with pytest's `--junitxml`.
"""

from __future__ import annotations

import argparse
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.common import facts
from benchmarks.common.results import RESULTS


@dataclass
class Module:
    """Results of one file of tests."""

    passed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    longest: tuple[float, str] = (0.0, "")
    failed: list[str] = field(default_factory=list)


def modules(cases: Iterable[ET.Element]) -> dict[str, Module]:
    """Groups junit's cases by file."""
    found: dict[str, Module] = {}
    for case in cases:
        name, seconds = case.get("name", ""), float(case.get("time", "0"))
        module = found.setdefault(_file(case.get("classname", "")), Module())
        module.seconds += seconds
        module.longest = max(module.longest, (seconds, name))
        if case.find("failure") is not None or case.find("error") is not None:
            module.failed.append(name)
        elif case.find("skipped") is not None:
            module.skipped += 1
        else:
            module.passed += 1
    return found


def _file(classname: str) -> str:
    """`tests.chaos.test_kill` or `tests.chaos.test_kill.TestClass` -> `tests/chaos/test_kill.py`."""
    parts = [part for part in classname.split(".") if not part.startswith("Test")]
    return "/".join(parts) + ".py"


def table(found: dict[str, Module]) -> list[str]:
    """Returns a Markdown table."""
    lines = ["| tests | passed | failed | skipped | s | the longest, s |", "| --- | --- | --- | --- | --- | --- |"]
    for file, m in sorted(found.items()):
        seconds, name = m.longest
        lines.append(
            f"| {file} | {m.passed} | {len(m.failed)} | {m.skipped} | {m.seconds:.0f} | `{name}` {seconds:.0f} |"
        )
    return lines


def main() -> int:
    """Writes the file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the file under results")
    parser.add_argument("junit", type=Path)
    parser.add_argument("command", help="what made it")
    given = parser.parse_args()
    found = modules(ET.parse(given.junit).getroot().iter("testcase"))
    failed = [f"{file}: `{name}`" for file, m in sorted(found.items()) for name in m.failed]
    machine, versions = facts.machine(), facts.own_versions()
    text = [
        f"# `{given.command}`", "",
        f"{facts.today()}, commit {versions.get('commit', 'unknown')}, torch {versions['torch']}; {machine['cores']} "
        f"cores, {machine['cpu']}.", "",
        *table(found), "",
        *(["Failed:", "", *(f"- {one}" for one in failed), ""] if failed else []),
    ]  # fmt: skip
    (RESULTS / f"{given.name}.md").write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
