"""Attributes of others are there again when nobody needs them replaced."""

from types import SimpleNamespace
from typing import Any

from meshwright.parallel.blockwise.patches import Patches, Place


def test_the_last_user_restores_what_the_first_one_found() -> None:
    holder, patches = SimpleNamespace(word="old"), Patches()
    first, second = (Place(holder, "word", lambda before, sign=sign: before + sign) for sign in "12")  # type: ignore[misc]
    patches.need([first])
    patches.need([second])
    assert holder.word == "old1"
    patches.release([first])
    assert holder.word == "old1"
    patches.release([second])
    assert holder.word == "old"


def test_what_somebody_else_put_there_stays() -> None:
    items: dict[str, Any] = {"word": "old", "other": "old"}
    places = [Place(items, name, str.upper) for name in items]
    patches = Patches()
    patches.need(places)
    items["word"] = "theirs"
    patches.release(places)
    assert items == {"word": "theirs", "other": "old"}
