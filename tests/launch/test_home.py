"""Folders of a user, also of one that the machine does not know."""

import pwd
from pathlib import Path
from typing import NoReturn

import pytest

from meshwright.launch.home import user_folder


def test_a_user_without_a_home_has_a_folder_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_folder("XDG_CONFIG_HOME", ".config", {}) == Path("/home/me/.config")
    assert user_folder("XDG_CONFIG_HOME", ".config", {"XDG_CONFIG_HOME": ""}) == Path("/home/me/.config")

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert user_folder("XDG_CONFIG_HOME", ".config", {}) == Path("/nonexistent/.config")
    assert user_folder("XDG_CONFIG_HOME", ".config", {"XDG_CONFIG_HOME": "/c"}) == Path("/c")
