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


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules of this repository that it imports anywhere: within functions, and for types alone, too."""
    files = {}
    for folder, target in {**MAPPED, "benchmarks": "benchmarks"}.items():
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join([*target.split("/"), *path.relative_to(ROOT / folder).with_suffix("").parts])
            files[name.removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                whole = ".".join([*base, *([node.module] if node.module else [])])
                names = {f"{whole}.{alias.name}" for alias in node.names}
                # `from . import x` is about x, not about the package that holds both.
                found |= names & files.keys() or {whole}
        graph[module] = (found & files.keys()) - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Modules that reach each other, each set once (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], order[other])
        if low[module] == order[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for module in graph:
        if module not in order:
            visit(module)
    return found


def test_imports_make_no_circle() -> None:
    assert not circles(import_graph())


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


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


MOST_FILES, MOST_LINES = 12, 400
HOUSE = [*MAPPED, "benchmarks", "tools"]


def test_every_folder_says_what_belongs_there_and_holds_a_dozen_files() -> None:
    for folder in (path for top in HOUSE for path in [ROOT / top, *(ROOT / top).rglob("*")]):
        modules = [path for path in folder.glob("*.py") if "_pb2" not in path.name and path.name != "__init__.py"]
        if not modules or folder.name in ("helm", "tools"):
            continue
        name = str(folder.relative_to(ROOT))
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), f"{name}/__init__.py says nothing"
        assert len(modules) <= MOST_FILES, name


def test_no_file_is_long() -> None:
    for path in (path for top in HOUSE for path in (ROOT / top).rglob("*.py") if "_pb2" not in path.name):
        assert len(path.read_text().splitlines()) <= MOST_LINES, path.relative_to(ROOT)


def pokes(path: Path) -> list[str]:
    """Where a test uses what is private, or patches a constant: `LINE: WHAT`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Attribute) and not (
            isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        ):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "monkeypatch.setattr":
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            patched = texts[0].rpartition(".")[2] if texts else ""
            names = [f"_{patched}"] if patched.isupper() else [patched]
        private = [name for name in names if name.startswith("_") and not name.startswith("__") and name != "_exit"]
        found += [f"{getattr(node, 'lineno', 0)}: {name}" for name in private]
    return found


def test_tests_use_what_is_public_and_patch_no_constant() -> None:
    found = {str(path.relative_to(ROOT / "tests")): pokes(path) for path in (ROOT / "tests").rglob("*.py")}
    assert not {name: where for name, where in found.items() if where}


@pytest.mark.parametrize(("room", "other"), [("agent", "rank"), ("rank", "agent"), ("messages", "agent|rank")])
def test_agent_and_ranks_know_nothing_of_each_other_but_their_messages(room: str, other: str) -> None:
    foreign = tuple(f"stagemesh.stage_worker.{name}" for name in other.split("|"))
    for module, found in import_graph().items():
        if module.startswith(f"stagemesh.stage_worker.{room}"):
            for imported in found:
                assert not imported.startswith(foreign), f"{module} imports {imported}"


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
