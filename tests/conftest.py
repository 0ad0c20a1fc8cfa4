"""What holds for every test: GPU tests need a GPU, no module is imported under two names, imports are no garbage."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from typing import Any

import hypothesis
import pytest

from tests.later import is_later
from tests.turns import in_turn

# the time of one example says more about the neighbours of this machine than about the code
hypothesis.settings.register_profile("meshwright", deadline=None)
hypothesis.settings.load_profile("meshwright")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks of a test share few cores; more threads only fight
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# what launches of tests leave for `meshwright ps` is not the user's
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="meshwright-state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

_KNOWN = [0]  # number of modules at the last look

FOLDERS = ("parallel", "moe", "launch", "clusters")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Imports without Python's search for garbage, as `import_all` does: what is collected stays."""
    gc.disable()
    try:
        return (yield)
    finally:
        _keep_imports()
        gc.enable()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """After a test that imported more: to walk over torch and transformers again and again takes half a second each."""
    found = yield
    if len(sys.modules) != _KNOWN[0]:
        gc.collect()
        _keep_imports()
    return found


def pytest_collection_finish() -> None:
    """Most ranks need a model of transformers, which is imported where they are forked from instead of by each."""
    from meshwright.parallel.forks import learn

    learn(["transformers.models.llama.modeling_llama"])


def _keep_imports() -> None:
    gc.freeze()
    _KNOWN[0] = len(sys.modules)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Of whole files, see `in_turn`."""
    return in_turn(config, log) if config.option.dist == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves long ones to `make wide`, and skips those marked `gpu` where there is none."""
    for item in items:
        if is_later(item.nodeid):
            item.add_marker(pytest.mark.wide)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if wanting and not _has_gpu():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session", autouse=True)
def one_name_per_module() -> Iterator[None]:
    """After the whole run, `meshwright.parallel` was never also imported as `parallel`."""
    yield
    bare = [name for name in sys.modules if name.split(".")[0] in FOLDERS]
    assert bare == [], f"imported under a bare name: {bare}; import meshwright.{bare[0]}"
