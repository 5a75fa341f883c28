"""The house rules that no linter knows: borders between services and rooms, the package mapping, the public surface."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVICES = ("coordinator", "stage_worker", "gateway")
MAPPED = {"stagemesh": "stagemesh", "protos": "stagemesh/protos"} | {s: f"stagemesh/{s}" for s in SERVICES}


def imports(path: Path) -> set[str]:
    """Absolute names that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_never_imports_another(service: str) -> None:
    foreign = tuple(f"stagemesh.{other}" for other in SERVICES if other != service)
    for path in (ROOT / service).rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(foreign), f"{path.relative_to(ROOT)} imports {name}"
            assert name.split(".")[0] not in (*SERVICES, "protos"), f"{path.relative_to(ROOT)} imports {name} by folder"


def test_shared_code_does_not_lean_on_services() -> None:
    """Only the command line starts services, and only by name."""
    for path in (ROOT / "stagemesh").rglob("*.py"):
        if path.parent.name == "cli":
            continue
        for name in imports(path):
            assert not name.startswith(tuple(f"stagemesh.{s}" for s in SERVICES)), f"{path.name} imports {name}"


def modules() -> dict[str, Path]:
    """Every module of the product by its import name; a package is its `__init__`."""
    found = {}
    for folder, target in MAPPED.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [*target.split("/"), *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_modules(name: str, known: dict[str, Path]) -> set[str]:
    """Modules of the product that a module imports, anywhere in it: in functions and for type checking, too."""
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - max(0, node.level - 1)])
            base = ".".join(filter(None, [base if node.level else "", node.module]))
            names |= {inner if (inner := f"{base}.{alias.name}") in known else base for alias in node.names}
    return (names & set(known)) - {name}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Sets of modules each of which imports, over others, itself (strongly connected components)."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            if (name := waiting.pop()) not in seen:
                seen.add(name)
                waiting += graph[name]
        return seen

    reach = {name: reached(name) for name in graph}
    return {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}


KNOWN_CIRCLES = {
    frozenset({"stagemesh.transport.tcp", "stagemesh.transport.tcp_conn"}),
    frozenset({"stagemesh.transport.ucx", "stagemesh.transport.ucx_ear", "stagemesh.transport.ucx_peer"}),
}
"""Being mended; an entry that is no longer needed fails the test."""


def test_imports_make_no_circle() -> None:
    known = modules()
    assert circles({name: imported_modules(name, known) for name in known}) == KNOWN_CIRCLES


def test_a_circle_is_found() -> None:
    graph: dict[str, set[str]] = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}
    assert circles(graph) == {frozenset({"b", "c"})}


@pytest.mark.parametrize(("room", "other"), [("agent", "rank"), ("rank", "agent"), ("messages", "agent|rank")])
def test_agent_and_ranks_know_nothing_of_each_other_but_their_messages(room: str, other: str) -> None:
    known = modules()
    foreign = tuple(f"stagemesh.stage_worker.{name}" for name in other.split("|"))
    for name in known:
        if name.startswith(f"stagemesh.stage_worker.{room}"):
            for imported in imported_modules(name, known):
                assert not imported.startswith(foreign), f"{name} imports {imported}"


MOST_MODULES = 12
CROWDED = {"coordinator"}
"""Folders with more that are being worked on; an entry that is no longer needed fails the test."""


def test_every_folder_says_what_belongs_there_and_is_small() -> None:
    crowded = set()
    for folder in set(MAPPED) - {"protos"}:
        for init in (ROOT / folder).rglob("__init__.py"):
            room = str(init.parent.relative_to(ROOT))
            assert ast.get_docstring(ast.parse(init.read_text())), f"{room} does not say what belongs there"
            if len([path for path in init.parent.glob("*.py") if path != init]) > MOST_MODULES:
                crowded.add(room)
    assert crowded == CROWDED


def test_no_pickle_anywhere() -> None:
    for folder in MAPPED:
        for path in (ROOT / folder).rglob("*.py"):
            assert not imports(path) & {"pickle", "cloudpickle", "dill", "marshal"}, path


@pytest.mark.parametrize(
    "module",
    [
        "stagemesh.gateway.main",
        "stagemesh.coordinator.main",
        "stagemesh.stage_worker.main",
        "stagemesh.local.supervisor",
    ],
)
def test_only_ranks_import_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted(m for m in ('torch', 'transformers', 'ucxx') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = set()
    for folder, target in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([*target.split("/"), *inner]))
    assert listed == found


def test_the_wheel_holds_the_tree(tmp_path: Path) -> None:
    # A copy: building in the tree would leave a build folder whose stale files the next wheel takes along.
    source = tmp_path / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")
    for folder in MAPPED:
        shutil.copytree(ROOT / folder, source / folder, ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=120, cwd=tmp_path)
    (wheel,) = tmp_path.glob("stagemesh-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, target in MAPPED.items():
        for path in (ROOT / folder).rglob("*"):
            kept = (
                path.suffix in (".py", ".pyi", ".proto", ".typed", ".h", ".cpp", ".so")
                or path.parent.name == "demo_model"
            )
            if path.is_file() and kept and "__pycache__" not in path.parts and path.name != "generate.py":
                expected.add(f"{target}/{path.relative_to(ROOT / folder)}")
    assert {name for name in packed if not name.endswith("generate.py")} == expected


def test_the_public_surface_is_frozen() -> None:
    import stagemesh

    assert sorted(stagemesh.__all__) == ["Client", "__version__"]
    assert stagemesh.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
