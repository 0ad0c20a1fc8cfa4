"""Which ranks may be forked from an agent, and what it imports for them."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.clusters import imports as module
from meshwright.clusters.imports import IMPORTS, Imports, differing, module_of, shadowed

NAME = st.sampled_from(["A", "HF_HOME", "LD_PRELOAD", "PYTHONPATH", "NCCL_DEBUG", "LC_ALL", "MESHWRIGHT_RUN_ID"])
SOME = st.dictionaries(NAME, st.sampled_from(["", "1", "2"]))
Begin = Callable[[str], Imports]
COMMAND = (sys.executable, "-u", "-m", "train")


@given(SOME, SOME, SOME)
def test_what_differs_at_the_start_or_at_the_imports_is_named(
    wanted: dict[str, str], born: dict[str, str], under: dict[str, str]
) -> None:
    found = differing(wanted, born=born, under=under)
    for name in ("LD_PRELOAD", "PYTHONPATH", "LC_ALL"):
        assert (name in found) == (wanted.get(name) != born.get(name))
    for name in ("A", "HF_HOME"):
        assert (name in found) == (wanted.get(name) != under.get(name))
    assert not {"NCCL_DEBUG", "MESHWRIGHT_RUN_ID"} & {*found}


@pytest.mark.parametrize(
    ("born", "wanted", "late"), [("", "4", False), ("4", "4", False), ("4", "2", True), ("", "4,2", True)]
)
def test_a_number_of_threads_is_heeded_or_named(born: str, wanted: str, late: bool) -> None:
    had = {"OMP_NUM_THREADS": born} if born else {}
    assert differing({"OMP_NUM_THREADS": wanted}, born=had, under=had) == ["OMP_NUM_THREADS"] * late


@pytest.mark.parametrize(
    "argv",
    [
        ["python", "-u", "-m", "train"],
        [sys.executable, "-m", "train"],
        [sys.executable, "-u", "train.py"],
        [sys.executable, "-u", "-m"],
        [],
    ],
)
def test_other_commands_are_not_taken_for_modules_of_this_interpreter(argv: list[str]) -> None:
    assert module_of(argv) is None


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Begin:
    def begin_to_import(names: str) -> Imports:
        monkeypatch.setenv(IMPORTS, names)
        monkeypatch.delenv("PYTHONPATH", raising=False)
        monkeypatch.setattr(sys, "path", [os.getcwd(), *sys.path])
        found = Imports()
        found.begin()
        return found

    return begin_to_import


linux = pytest.mark.skipif(sys.platform != "linux", reason="ranks are forked on Linux alone")


@linux
def test_a_directory_with_modules_of_its_own_has_its_ranks_executed(begin: Begin, tmp_path: Path) -> None:
    begun = begin("json")
    assert begun.why_not(COMMAND, tmp_path) == ""
    (tmp_path / "train.py").touch()
    assert begun.why_not(COMMAND, tmp_path) == ""
    (tmp_path / "json.py").touch()
    (tmp_path / "torch").mkdir()
    begun.await_torch()
    assert begun.why_not(COMMAND, tmp_path) == f"{tmp_path} has modules of its own for json, torch"


@linux
def test_modules_are_looked_for_where_ranks_look(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"module_{time.time_ns()}"
    (tmp_path / f"{name}.py").write_text("VALUE = 1\n")
    begun = begin(name)
    begun.go_on(tmp_path)
    begun.await_all(lambda: False)
    assert sys.modules[name].VALUE == 1
    assert begun.failed == []


@linux
def test_an_import_that_breaks_off_is_remembered_and_one_of_nothing_is_not(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"module_{time.time_ns()}"
    (tmp_path / f"{name}.py").write_text("import no_such_thing\n")
    begun = begin(f"{name} no_such_package.inner json.no_such_part")
    begun.go_on(tmp_path)
    begun.await_all(lambda: False)
    assert begun.failed == [f"{name}: No module named 'no_such_thing'"]


@linux
def test_without_semaphores_ranks_are_executed(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = begin("json")

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_use_what_forks_need", full)
    assert "No space left" in begun.why_not(COMMAND, tmp_path)


@linux
def test_places_relative_to_another_directory_have_ranks_executed(
    begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = begin("json")
    monkeypatch.setenv("PYTHONPATH", f"/usr/lib{os.pathsep}lib")
    begun._born = begun._under = dict(os.environ)
    assert begun.why_not(COMMAND, tmp_path).startswith("PYTHONPATH names")
    assert begun.why_not(COMMAND, Path.cwd()) == ""


@linux
def test_nothing_is_imported_for_other_commands(begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = begin("json")
    assert begun.why_not(["python", "train.py"], tmp_path) == "nothing is imported for python train.py"
    monkeypatch.delenv(IMPORTS)
    assert begun.why_not(COMMAND, tmp_path).startswith("nothing is imported")


def test_files_and_folders_of_a_directory_shadow_modules(tmp_path: Path) -> None:
    (tmp_path / "queue.py").touch()
    (tmp_path / "torch").mkdir()
    assert shadowed(tmp_path, ["torch.nn", "queue", "json"]) == ["queue", "torch"]
    assert shadowed(tmp_path / "missing", ["torch"]) == []
