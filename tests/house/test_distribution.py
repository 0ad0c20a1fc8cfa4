"""What a user installs: the wheel is the tree, and the sdist holds real files where the tree holds links."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.house.tree import FOLDERS, PACKAGE, ROOT

pytestmark = pytest.mark.slow
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "tests")
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools replaces sys.argv
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


def _tree_files() -> set[str]:
    """What a distribution holds of the tree, by path under `meshwright/`."""
    kept = {"meshwright/py.typed"} | {f"meshwright/{path.name}" for path in PACKAGE.glob("*.py")}
    for folder in FOLDERS:
        found = [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).glob("catalog/*.yaml")]
        kept |= {f"meshwright/{path.relative_to(ROOT)}" for path in found}
    return kept


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel of a clean copy of the tree."""
    copy = tmp_path_factory.mktemp("copy") / "meshwright"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=LEFT_OUT)
    out = tmp_path_factory.mktemp("out")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_wheel_holds_the_tree_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == _tree_files()


def test_the_sdist_holds_real_files_in_place_of_links(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if member.issym() or member.islnk()] == []
    files = {
        member.name.split("/src/", 1)[1] for member in members if member.isfile() and "/src/meshwright/" in member.name
    }
    assert files == _tree_files()


def test_the_wheel_imports_from_elsewhere(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import meshwright.parallel.mesh as m; print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env={"PYTHONPATH": "."}
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
