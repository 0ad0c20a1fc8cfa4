"""What nodes and ranks of a run tell each other over a store that others may reach, too: text with a mac of their key.

A mac (HMAC-SHA256) covers the name in the store, the run and its attempt, and the text: nothing counts in another place
or at another time. What has none, or a wrong one, is as if it were not there; it is said once of each name.
Nothing is hidden by it, and who reaches the store can still take things away from it.
"""

import hmac
import json
import os
from contextlib import suppress

__all__ = ["BOARD_KEY", "Keyed", "derived"]

BOARD_KEY = "MESHWRIGHT_BOARD_KEY"
"""Variable of ranks that holds their own key, in hexadecimal."""

_MAC_DIGITS = 64


def derived(key: bytes, purpose: str) -> bytes:
    """A key for one purpose, which tells nothing of the one that it was made from.

    Args:
        key: of the run.
        purpose: a word.

    >>> len(derived(bytes(32), "board")), derived(bytes(32), "board") == derived(bytes(32), "other")
    (32, False)
    """
    return hmac.digest(key, purpose.encode(), "sha256")


class Keyed:
    """Signs and checks texts of one run, or of one attempt of it.

    Args:
        key: that all of its nodes have, and nobody else.
        scope: run and attempt, in any words that are the same on all nodes.
        place: where names stand, for people.

    >>> ours = Keyed(bytes(32), "run r1, attempt 0")
    >>> ours.opened("decided", ours.signed("decided", "yes").encode())
    'yes'
    """

    def __init__(self, key: bytes, scope: str, place: str = "in the store") -> None:
        self._key, self._scope, self._place = key, scope, place
        self._said: set[str] = set()

    def signed(self, name: str, text: str) -> str:
        """A text with its mac.

        Args:
            name: under which it is written.
            text: of any form.
        """
        return self._mac(name, text) + text

    def opened(self, name: str, value: bytes) -> str | None:
        """The text that was signed; None, and once a warning, for what was not written by this run under this name.

        Args:
            name: under which it was found.
            value: what was found.
        """
        with suppress(UnicodeDecodeError):
            told = value.decode()
            mac, text = told[:_MAC_DIGITS], told[_MAC_DIGITS:]
            if hmac.compare_digest(mac.encode(), self._mac(name, text).encode()):
                return text
        self._warn(name)
        return None

    def _mac(self, name: str, text: str) -> str:
        whole = json.dumps([self._scope, name, text]).encode()
        return hmac.digest(self._key, whole, "sha256").hex()

    def _warn(self, name: str) -> None:
        if name in self._said:
            return
        self._said.add(name)
        line = f"meshwright: {name} {self._place} was not written by this run, and is ignored; who reaches its port?"
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())  # past sys.stderr, whose lock a stuck thread may hold
