"""YAML 1.2, positions, and limits on what a file may do."""

from typing import Any

import pytest
import yaml

from meshwright.launch import yaml_text
from meshwright.launch.errors import JobError
from meshwright.launch.yaml_nodes import Table
from meshwright.launch.yaml_text import read_tree


def plain(text: str) -> Any:
    tree = read_tree(text, "job.yaml")
    assert not tree.problems, tree.problems
    return tree.root.plain()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24:00:00", "24:00:00"),
        ("01:30:00", "01:30:00"),
        ("1:2", "1:2"),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("3.10", 3.1),
        ("2026-01-02", "2026-01-02"),
        ("2026-01-02T03:04:05Z", "2026-01-02T03:04:05Z"),
        ("true", True),
        ("FALSE", False),
        ("tRue", "tRue"),
        ("null", None),
        ("~", None),
        ("", None),
        ('"1"', "1"),
        ("'on'", "on"),
        ("=", "="),
        ("|\n  a\n  b\n", "a\nb\n"),
        ("1.2.3", "1.2.3"),
        (".", "."),
        ("+", "+"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = plain(f"x: {text}")["x"]
    assert found == value
    assert type(found) is type(value)


def test_nodes_know_where_they_were_written() -> None:
    root = read_tree("a: 1\nb:\n  - {c: [x, yy]}\n", "job.yaml").root
    assert isinstance(root, Table)
    assert str(root.marks["b"]) == "job.yaml:2:1"
    inner: Any = root.nodes["b"]
    assert str(inner.nodes[0].nodes["c"].nodes[1].mark) == "job.yaml:3:13"
    assert sorted(root.dotted_keys()) == ["a", "b"]


def test_both_parsers_of_pyyaml_give_the_same_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'a: &x {b: [1, "2", c], d: 24:00:00}\ne: *x\nf: |\n  on\n'
    fast = read_tree(text, "j")
    monkeypatch.setattr(yaml_text, "_LOADER", yaml.SafeLoader)
    assert read_tree(text, "j") == fast


def test_an_alias_repeats_a_value() -> None:
    assert plain("a: &x [1, 2]\nb: *x\n") == {"a": [1, 2], "b": [1, 2]}


def test_a_byte_order_mark_is_skipped() -> None:
    assert read_tree("\ufeffa: 1".encode(), "j").root.plain() == {"a": 1}


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("", "1:1", "empty"),
        ("# nothing\n", "1:1", "empty"),
        ("a: 1\n---\nb: 2\n", "2:1", "second document"),
        ("a: [1, 2\n", "2:1", "not YAML"),
        ("a: 1\n\tb: 2\n", "2:1", "a tab"),
        ("a:\n\t- 1\n", "2:1", "a tab"),
        ("a: b: c\n", "1:5", "not YAML"),
        ("logs: {dir: runs/{name}, merge: true}\n", "1:18", 'quote text that contains "{name}"'),
        ("a: *b\n", "1:4", "no anchor"),
        ("a: &x [*x]\n", "1:8", "inside the value it repeats"),
        ("a: @b\n", "1:4", "not YAML"),
        ("a: 'b\n", "2:1", "not YAML"),
        ("a: \x01\n", "1:4", "not allowed"),
        ("a: " + "[" * 40 + "]" * 40, "1:36", "deeper than 32"),
        ("a: " + "{b: " * 40 + "}" * 40, "1:129", "deeper than 32"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_position(text: str, where: str, message: str) -> None:
    with pytest.raises(JobError) as caught:
        read_tree(text, "j")
    assert caught.value.where == f"j:{where}"
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "3:1", "duplicate key, first written at line 1"),
        ("a: !!python/object/apply:os.system [ls]\n", "1:4", "tag"),
        ("a: !!str 1\n", "1:4", "tag"),
        ("a: !mine 1\n", "1:4", "tag"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "3:3", "merge key"),
        ("1: a\n", "1:1", 'write "1"'),
        ("null: a\n", "1:1", "a key must be text"),
        ("[a]: b\n", "1:1", "a key must be text"),
        ("a: {name}\n? {b: c}\n: d\n", "2:3", "a key must be text"),
        ("a: .nan\n", "1:4", "finite"),
        ("a: -.inf\n", "1:4", "finite"),
        ("a: 1e999\n", "1:4", "finite"),
        ("a: 99999999999999999999\n", "1:4", "64 bits"),
        ("a: " + "9" * 10_000 + "\n", "1:4", "64 bits"),
        ("a: 0x" + "f" * 10_000 + "\n", "1:4", "64 bits"),
        ('a: "\\0"\n', "1:4", "NUL"),
    ],
)
def test_what_must_not_be_interpreted_is_noted_with_its_position(text: str, where: str, message: str) -> None:
    (mark, _, found), *_ = read_tree(text, "j").problems
    assert str(mark) == f"j:{where}"
    assert message in found


def test_a_bomb_of_aliases_is_refused_before_it_is_expanded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(JobError, match="more than 20000 values"):
        read_tree("\n".join(lines), "j")


def test_deep_aliases_count_as_deep() -> None:
    lines = ["a0: &a0 [[[[[[[[x]]]]]]]]"]
    lines += [f"a{n}: &a{n} [[[[[[[[*a{n - 1}]]]]]]]]" for n in range(1, 9)]
    with pytest.raises(JobError, match="deeper than 32"):
        read_tree("\n".join(lines), "j")


def test_many_aliases_are_refused() -> None:
    with pytest.raises(JobError, match="more than 100 aliases"):
        read_tree("a: &x 1\nb: [" + "*x, " * 101 + "]", "j")


def test_a_large_file_is_refused_unread() -> None:
    with pytest.raises(JobError, match="at most 1048576 bytes"):
        read_tree(b"a" * (yaml_text.MAX_BYTES + 1), "j")


def test_text_that_is_not_utf8_names_the_byte() -> None:
    with pytest.raises(JobError, match="j:2:4: byte 0xff is not UTF-8"):
        read_tree(b"a: 1\nb: \xff\n", "j")


def test_utf16_is_refused() -> None:
    with pytest.raises(JobError, match="not UTF-8"):
        read_tree("a: 1".encode("utf-16"), "j")
