"""The layout: real folders at the root, one import name, arrows that point downhill."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.house.tree import FOLDERS, PACKAGE, ROOT, imports, modules

MODULES = modules()
FLOORS = {"parallel": 0, "moe": 1, "clusters": 2, "launch": 3}
NEEDS_TORCH = (
    "meshwright.clusters.elastic",
    "meshwright.clusters.node_run",
    "meshwright.clusters.rendezvous",
    "meshwright.launch.paper.advice",
    "meshwright.launch.paper.drawing",
    "meshwright.launch.paper.positions",
    "meshwright.launch.paper.states",
    "meshwright.launch.worker",
)
IMPORT_BUDGET_S = 0.150


def _python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _floor(name: str) -> int | None:
    parts = name.split(".")
    return FLOORS.get(parts[1]) if parts[0] == "meshwright" and len(parts) > 1 else None


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_root_folder_has_its_relative_link(folder: str) -> None:
    assert os.readlink(PACKAGE / folder) == f"../../{folder}"
    assert not (ROOT / folder).is_symlink()


def test_every_root_folder_with_modules_is_known() -> None:
    holding = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert holding - {"benchmarks", "tests"} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_cannot_be_imported_under_its_bare_name(folder: str, tmp_path: Path) -> None:
    code = f"""
try:
    import {folder}
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert _python(code, tmp_path) == folder


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_and_what_it_exports(name: str) -> None:
    body = ast.parse(MODULES[name].read_text())
    assert ast.get_docstring(body), "the first thing in a module is what it is"
    if MODULES[name].name in {"__init__.py", "__main__.py"} and len(body.body) == 1:
        return
    assigned = [node.targets[0] for node in body.body if isinstance(node, ast.Assign)]
    assert "__all__" in [target.id for target in assigned if isinstance(target, ast.Name)]


@pytest.mark.parametrize("name", [name for name in MODULES if _floor(name) is not None])
def test_imports_run_downhill(name: str) -> None:
    own = FLOORS[name.split(".")[1]]
    uphill = [each for each, _ in imports(MODULES[name].read_text()) if (_floor(each) or 0) > own]
    assert uphill == []


def test_an_uphill_import_would_be_seen() -> None:
    found = dict(imports("from meshwright.launch.spec import Job\nimport meshwright.clusters.local"))
    assert found == {"meshwright.launch.spec": True, "meshwright.clusters.local": True}
    assert [_floor(each) for each in found] == [3, 2]


def test_light_modules_import_no_torch() -> None:
    light = [name for name in MODULES if name.startswith(("meshwright.launch", "meshwright.clusters"))]
    light = [name for name in light if not name.startswith(NEEDS_TORCH)]
    heavy = {"torch", "transformers", "deepspeed", "numpy", "matplotlib"}
    code = f"""
import sys, importlib
for name in {[*light, "meshwright", "meshwright.parallel.mesh"]!r}:
    importlib.import_module(name)
    found = {heavy!r} & set(sys.modules)
    assert not found, (name, found)
print(len(sys.modules) > 0)
"""
    assert _python(code, ROOT) == "True"


@pytest.mark.parametrize("name", ["meshwright", "meshwright.parallel.mesh", "meshwright.launch.spec"])
def test_specs_and_meshes_import_in_no_time(name: str) -> None:
    code = f"import time; start = time.process_time(); import {name}; print(time.process_time() - start)"
    assert min(float(_python(code, ROOT)) for _ in range(5)) < IMPORT_BUDGET_S


def test_mypy_is_content_and_sees_every_file(tmp_path: Path) -> None:
    shared = ROOT / ".mypy_cache"
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(shared if shared.is_dir() else tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in {len(MODULES)} source files" in done.stdout
