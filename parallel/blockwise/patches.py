"""Attributes and items of others that are replaced while somebody in the process needs it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Lock
from typing import Any

__all__ = ["Patches", "Place"]


@dataclass(frozen=True, eq=False)
class Place:
    """What is replaced, and by what.

    Attributes:
        holder: a dict, which has items, or anything else, which has attributes.
        name: of the item or attribute.
        wrap: what was there -> what goes there.
    """

    holder: Any
    name: str
    wrap: Callable[[Any], Any]

    @property
    def key(self) -> tuple[int, str]:
        """Equal for equal places."""
        return id(self.holder), self.name

    @property
    def value(self) -> Any:
        """What is there."""
        return self.holder[self.name] if isinstance(self.holder, dict) else getattr(self.holder, self.name)

    def put(self, value: Any) -> None:
        """Puts something else there."""
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        else:
            setattr(self.holder, self.name, value)


@dataclass
class _Held:
    users: int
    before: Any
    replacement: Any


class Patches:
    """Places and how many users each has: the first one's replacement goes in, and out when the last one leaves.

    >>> words, patches = {"word": "old"}, Patches()
    >>> place = Place(words, "word", lambda before: before + "er")
    >>> patches.need([place]), patches.need([place]), patches.release([place]), words["word"]
    (None, None, None, 'older')
    >>> patches.release([place]), words["word"]
    (None, 'old')
    """

    def __init__(self) -> None:
        self._held: dict[tuple[int, str], _Held] = {}
        self._lock = Lock()

    def need(self, places: Iterable[Place]) -> None:
        """One more user of each place."""
        with self._lock:
            for place in places:
                held = self._held.get(place.key)
                if held is None:
                    held = self._held[place.key] = _Held(0, place.value, place.wrap(place.value))
                    place.put(held.replacement)
                held.users += 1

    def release(self, places: Iterable[Place]) -> None:
        """One user less; what somebody else put there in the meantime stays."""
        with self._lock:
            for place in places:
                held = self._held[place.key]
                held.users -= 1
                if not held.users:
                    del self._held[place.key]
                    if place.value is held.replacement:
                        place.put(held.before)
