"""Where this user keeps settings and state."""

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["user_folder"]

_NOWHERE = "/nonexistent"


def user_folder(variable: str, default: str, environment: Mapping[str, str] = os.environ) -> Path:
    """A folder of the XDG base directory specification.

    Args:
        variable: that names it.
        default: below the home directory, where the variable is not set.
        environment: of this process.

    Returns:
        A path that does not exist for a user without a home, such as a bare number in a container.

    >>> user_folder("XDG_STATE_HOME", ".local/state", {"XDG_STATE_HOME": "/state"})
    PosixPath('/state')
    """
    home = os.path.expanduser("~")
    return Path(environment.get(variable) or os.path.join(_NOWHERE if home == "~" else home, default))
