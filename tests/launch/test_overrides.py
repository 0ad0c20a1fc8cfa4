"""`--set a.b=c`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from meshwright.launch.load import load_job
from meshwright.launch.overrides import apply_override
from meshwright.launch.yaml_text import read_tree

PROGRAM = "name: a\ncommand: [b, c]\nfailure: {max_restarts: 1}\nnodes: 1\n"


def after(*overrides: str, text: str = PROGRAM) -> Any:
    root = read_tree(text, "job.yaml").root
    for place, override in enumerate(overrides):
        root = apply_override(root, override, place)
    return root.plain()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=b", "name", "b"),
        ("name=1e-5", "name", 1e-5),
        ("name=24:00:00", "name", "24:00:00"),
        ('name="1"', "name", "1"),
        ("name=", "name", None),
        ("name=a: b # c", "name", "a: b # c"),
        ("name=a=b", "name", "a=b"),
        ("name={b: [1, x]}", "name", {"b": [1, "x"]}),
        ("command=[x, 'y z']", "command", ["x", "y z"]),
        ("command.1=x", "command", ["b", "x"]),
        ("failure.max_restarts=0", "failure", {"max_restarts": 0}),
        ("failure.backoff.max=1m", "failure", {"max_restarts": 1, "backoff": {"max": "1m"}}),
        ("logs.merge=false", "logs", {"merge": False}),
    ],
)
def test_an_override_replaces_or_adds_one_key(override: str, key: str, value: Any) -> None:
    assert after(override) == {**after(), key: value}


def test_later_overrides_win() -> None:
    assert after("name=b", "name=c")["name"] == "c"


def test_the_tree_of_the_file_stays_as_it_was() -> None:
    root = read_tree(PROGRAM, "job.yaml").root
    apply_override(root, "failure.max_restarts=9")
    assert root.plain() == after()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "--set name: expected dotted.key=value, such as --set parallel.dp=4"),
        ("=1", "--set =1: expected dotted.key=value, such as --set parallel.dp=4"),
        ("a..b=1", "--set a..b=1: expected dotted.key=value, such as --set parallel.dp=4"),
        (
            "failure.max_restart=1",
            "--set failure.max_restart=1: failure.max_restart: unknown key 'max_restart'; did you mean 'max_restarts'?",
        ),
        (
            "failure.max_restarts=many",
            '--set failure.max_restarts=many: failure.max_restarts: expected an integer, got "many"',
        ),
        (
            "paralel.dp=2",
            "--set paralel.dp=2: paralel: unknown key 'paralel'; did you mean 'parallel'?",
        ),
        ("nodes.min=1", "--set nodes.min=1: nodes: nodes is '1', which has no keys; set nodes itself"),
        (
            "command.2=x",
            "--set command.2=x: command: command is a list of 2 items; write a number from 0, got '2'",
        ),
        (
            "name=[a",
            "--set name=[a: this is not YAML: did not find expected ',' or ']' "
            "(while parsing a flow sequence that starts at line 1)",
        ),
        ("nodes=.inf", "--set nodes=.inf: expected a finite number, got .inf"),
        ("nodes=0", "--set nodes=0: nodes: expected a number, at least 1, got 0"),
        (
            "env={a: x, a: y}",
            "--set env={a: x, a: y}: duplicate key, first written at line 1; keep one of them",
        ),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str, refuse: Callable[..., list[str]]) -> None:
    assert refuse(PROGRAM, override) == [message]


def test_an_override_can_mend_a_file(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(PROGRAM.replace("max_restarts: 1", "max_restarts: many"))
    loaded = load_job(file, ["failure.max_restarts=2"])
    assert loaded.job.failure.max_restarts == 2
    assert loaded.where("failure.max_restarts") == "--set failure.max_restarts=2"
    assert "failure.max_restarts" in loaded.keys
