"""What the docs say of the code is there: files, functions, links between pages."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md"])


def names(path: Path) -> set[str]:
    """Functions, methods and classes that a file defines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


def test_every_step_of_a_requests_life_is_where_the_page_says() -> None:
    text = (ROOT / "docs/request-flow.md").read_text()
    places = re.findall(r"`([\w/]+\.py):(\w+)`", text)
    assert len(places) > 20
    for file, name in places:
        assert name in names(ROOT / file), f"{file}:{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for module in re.findall(r"python -m ((?:benchmarks|tools)[\w.]*)", text):
        assert importlib.util.find_spec(module) is not None, f"{page.name} names {module}"
    for script in re.findall(r"python ((?:benchmarks|tools|tests|protos)/[\w/]+\.py)", text):
        assert (ROOT / script).exists(), f"{page.name} names {script}"
    for file in re.findall(
        r"`((?:stagemesh|gateway|coordinator|stage_worker|tests|tools|protos|docs)/[\w/.-]+\.\w+)`", text
    ):
        assert (ROOT / file).exists(), f"{page.name} names {file}"
