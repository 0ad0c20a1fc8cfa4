"""Large imports: what fails is told, and the search for garbage rests meanwhile."""

import gc
import sys
import time
from pathlib import Path

import pytest

from meshwright.parallel.importing import import_all


def test_what_is_imported_is_not_searched_for_garbage_then_nor_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = (f"module_{time.time_ns()}_{which}" for which in ("good", "bad"))
    (tmp_path / f"{good}.py").write_text("import gc\nSEARCHED = gc.isenabled()\nKEPT = [[]]\n")
    (tmp_path / f"{bad}.py").write_text("raise ValueError('late')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert import_all([bad, good]) == [f"{bad}: ValueError: late"]
    found = sys.modules[good]
    assert not found.SEARCHED
    assert not any(each is found.KEPT for each in gc.get_objects())
    assert gc.isenabled(), "whatever follows is searched as ever"
