"""`meshwright COMMAND ...`: finds the command's module, runs it, and turns every error into a message and a code.

A launch starts its agent before anything else is imported, so that torch loads while the job is read.
"""

import atexit
import gc
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from meshwright.parallel.errors import MeshwrightError

if TYPE_CHECKING:
    import typer

__all__ = ["COMMANDS", "build_app", "main"]

COMMANDS = {
    "launch": "meshwright.launch.commands.launch",
    "verify": "meshwright.launch.commands.verify",
    "show": "meshwright.launch.commands.show",
    "simulate": "meshwright.launch.commands.simulate",
    "plan": "meshwright.launch.commands.plan",
    "ps": "meshwright.launch.commands.ps",
    "logs": "meshwright.launch.commands.logs",
    "attach": "meshwright.launch.commands.attach",
    "page": "meshwright.launch.commands.page",
    "cancel": "meshwright.launch.commands.cancel",
    "doctor": "meshwright.launch.commands.doctor",
}
"""Command -> module with a function of that name; imported when it is wanted."""

_GLANCE_CHARACTERS = 1 << 16
_COLLECT_AFTER = 100_000  # objects
_USAGE, _BAD_JOB, _INTERNAL, _INTERRUPTED = 64, 65, 70, 130


def build_app(names: Sequence[str]) -> "typer.Typer":
    """The command line with these commands."""
    import typer

    app = typer.Typer(
        name="meshwright",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        help="One YAML describes a model, a mesh and a cluster: proved on a laptop, launched anywhere.",
    )
    app.callback()(_group)
    for name in names:
        app.command(name)(getattr(import_module(COMMANDS[name]), name))
    return app


def _group() -> None:
    """Distributed training from one YAML file."""


def _starts_ranks(words: Sequence[str]) -> bool:
    """Whether a launch will need an agent of this machine, as far as its words and its file tell at a glance."""
    if len(words) < 2 or words[0] != "launch" or {"--dry-run", "--help", "--detach"} & set(words):
        return False
    said = [word for word in words if re.match(r"cluster(\.type)?=", word)]
    return "local" in said[-1] if said else all(_stays_here(word) for word in words[1:])


def _stays_here(word: str) -> bool:
    """Whether a word is no file of a job that names another cluster than this machine; wrong guesses cost time only."""
    if not os.path.isfile(word):  # what comes through a pipe can be read only once
        return True
    try:
        with open(word, errors="replace") as file:
            text = file.read(_GLANCE_CHARACTERS)
    except OSError:
        return True
    found = re.search(r"^cluster:.*(?:\n(?:[ \t].*)?)*", text, re.MULTILINE)
    return found is None or "local" in found[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line; returns its exit code.

    Args:
        arguments: words after the program's name; None takes those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _collect_rarely()
    _print_anything()
    if _starts_ranks(words):
        from meshwright.clusters.spawn import keep_warm

        keep_warm()
    try:
        return _run(words)
    except MeshwrightError as error:
        sys.stderr.write(f"meshwright: {_printable(error)}\n")
        return int(getattr(error, "exit_code", _BAD_JOB))
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is left to be flushed to
        return _INTERNAL
    except Exception as error:
        sys.stderr.write(_bug(error))
        return _INTERNAL
    finally:
        if _starts_ranks(words):
            from meshwright.clusters.spawn import end_warm

            end_warm()


def _collect_rarely() -> None:
    """Little garbage lies in cycles here: looking for it after each 700 objects, and at the end, is a fifth of `ps`."""
    gc.set_threshold(_COLLECT_AFTER, 20, 100)
    atexit.register(gc.freeze)


def _print_anything() -> None:
    """Paths may hold bytes that are no text: they are printed as they are, and what a terminal lacks by its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            utf8 = stream.encoding.lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 and stream is sys.stdout else "backslashreplace")


def _run(words: list[str]) -> int:
    names = [words[0]] if words and words[0] in COMMANDS else list(COMMANDS)
    app = build_app(names)
    try:
        code = app(words, standalone_mode=False)
    except Exception as error:
        show = getattr(error, "show", None)  # what typer raises for a command line that it cannot read
        if show is None:
            raise
        show()
        return _USAGE
    return code if isinstance(code, int) else 0


def _printable(error: Exception) -> str:
    """An error's lines, in which a name that somebody gave cannot act on the terminal."""
    return "".join(each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in str(error))


def _bug(error: Exception) -> str:
    number, path = tempfile.mkstemp(prefix="meshwright-error-", suffix=".txt")
    with os.fdopen(number, "w") as file:
        traceback.print_exception(error, file=file)
    return (
        f"meshwright: this is a bug: {type(error).__name__}: {error}\n"
        f"the traceback is in {path}; please report it with the job file\n"
    )


if __name__ == "__main__":
    sys.exit(main())
