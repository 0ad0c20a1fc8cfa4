"""Bad input: hundreds of broken jobs, each refused with positions, never with a traceback of another kind."""

import contextlib
import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.launch import yaml_text
from meshwright.launch.errors import JobError
from meshwright.launch.load import load_job
from meshwright.launch.schema import job_schema
from meshwright.launch.spec import Job

EVERY_BLOCK = Path(__file__).with_name("every_block.yaml").read_text()
FULL: dict[str, Any] = yaml.safe_load(EVERY_BLOCK)
SCHEMA = job_schema()
POSITION = re.compile(r"\S+\.yaml:[1-9]\d*:[1-9]\d*")
WRONG: dict[str, list[Any]] = {
    "integer": ["two", "2", True, 2.5, [1], {"a": 1}, None, -5, 2**70],
    "number": ["two", "1.5", True, [1.0], {}, None, -5.0, float("nan"), float("inf")],
    "string": [3, True, 1.5, ["a"], {"a": "b"}, None],
    "boolean": ["yes", "on", 1, 0, "true", None, []],
    "array": ["a", 1, True, {"a": 1}, None],
    "object": ["a", 1, True, ["a"], None],
}
RAW = {
    "binary": b"\x00\x01\x02\xff\xfe",
    "an image": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
    "latin-1": "name: caf\xe9\ncommand: [a]\n".encode("latin-1"),
    "utf-16": "name: a\n".encode("utf-16"),
    "empty": b"",
    "spaces": b"   \n \n",
    "a comment": b"# job\n",
    "a list": b"- name: a\n",
    "a word": b"job\n",
    "a number": b"42\n",
    "null": b"null\n",
    "json list": b"[1, 2]",
    "tabs": b"name: a\n\tcommand: [a]\n",
    "tab indent": b"name: a\nlogs:\n\tmerge: true\n",
    "open bracket": b"name: a\ncommand: [a, b\n",
    "open brace": b"name: a\nlogs: {merge: true\n",
    "open quote": b'name: "a\ncommand: [b]\n',
    "open single quote": b"name: 'a\n",
    "stray bracket": b"name: a]\ncommand: ]\n",
    "bad indent": b"name: a\n  command: [b]\n",
    "two documents": b"name: a\ncommand: [b]\n---\nname: c\n",
    "document end": b"name: a\ncommand: [b]\n...\nname: c\n",
    "bad escape": b'name: "\\q"\ncommand: [b]\n',
    "surrogate": b'name: "\\ud800"\ncommand: [b]\n',
    "beyond unicode": b'name: "\\U00110000"\ncommand: [b]\n',
    "nul escape": b'name: a\ncommand: ["a\\0b"]\n',
    "escape character": b"name: a\x1b[31m\ncommand: [b]\n",
    "delete character": b"name: a\x7f\ncommand: [b]\n",
    "escaped control": b'name: "a\\e[31m"\ncommand: [b]\n',
    "newline in name": b'name: "a\\nb"\ncommand: [b]\n',
    "python tag": b"name: !!python/object/apply:os.system ['true']\ncommand: [b]\n",
    "python name": b"name: !!python/name:os.system\ncommand: [b]\n",
    "own tag": b"name: !x a\ncommand: [b]\n",
    "set tag": b"name: a\ncommand: !!set {a, b}\n",
    "bad directive": b"%FOO bar\n---\nname: a\ncommand: [b\n",
    "yaml version 9": b"%YAML 9.9\n---\nname: a\ncommand: [b]\n",
    "merge key": b"x: &x {a: 1}\nname: a\ncommand: [b]\nlogs: {<<: *x}\n",
    "unknown alias": b"name: *a\ncommand: [b]\n",
    "self alias": b"name: &a [*a]\ncommand: [b]\n",
    "bomb": b"a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n",
    "deep list": b"a: " + b"[" * 100_000,
    "deep mapping": b"{a: " * 50_000,
    "deep keys": b"{? " * 50_000,
    "deep block": b"".join(b" " * n + b"a:\n" for n in range(400)),
    "wide": b"name: a\ncommand: [" + b"a, " * 30_000 + b"]\n",
    "large": b"name: a\n" + b"# x\n" * 400_000,
    "long int": b"name: a\ncommand: [b]\nnodes: " + b"9" * 100_000 + b"\n",
    "long key": b"k" * 5000 + b": 1\n",
    "complex key": b"? [a, b]\n: c\n",
    "brace key": b"name: {name}\ncommand: [b]\n",
    "number key": b"1: a\nname: b\n",
    "empty key": b": a\nname: b\ncommand: [c]\n",
    "duplicate nested": b"name: a\ncommand: [b]\nlogs: {merge: true, merge: false}\n",
    "duplicate in env": b"name: a\ncommand: [b]\nenv:\n  A: x\n  A: y\n",
    "norway": b"name: a\ncommand: [b]\nshell: no\n",
    "on as key": b"name: a\ncommand: [b]\non: push\n",
    "sexagesimal": b"name: a\ncommand: [b]\nnodes: 1:2\n",
    "clock": b"name: a\ncommand: [b]\nfailure: {shutdown_grace: 24:00:00}\n",
    "octal of 1.1": b"name: a\ncommand: [b]\nfailure: {max_restarts: 0b11}\n",
    "underscores": b"name: a\ncommand: [b]\nfailure: {max_restarts: 1_000}\n",
    "date": b"name: a\ncommand: [b]\nversion: 2026-01-02\n",
    "version as float": b"name: a\ncommand: [b]\nversion: 1.0\n",
    "version as bool": b"name: a\ncommand: [b]\nversion: true\n",
    "version 2": b"name: a\ncommand: [b]\nversion: 2\n",
    "nan": b"name: a\ncommand: [b]\nhealth: {watch: {max_temp_c: .nan}}\n",
    "inf": b"name: a\ncommand: [b]\nfailure: {backoff: {factor: .inf}}\n",
    "1e999": b"name: a\ncommand: [b]\nfailure: {backoff: {factor: 1e999}}\n",
    "nan in config": b"name: a\nmodel: {architecture: llama, config: {x: .nan}}\n",
    "path as name": b"name: ../../etc\ncommand: [b]\n",
    "nothing to run": b"name: a\n",
    "unknown cluster": b"name: a\ncommand: [b]\ncluster: lab\n",
    "ray": b"name: a\ncommand: [b]\ncluster: {type: ray, adress: auto}\n",
    "two blocks of a cluster": b"name: a\ncommand: [b]\ncluster: {type: slurm, simulate_nodes: 2}\n",
    "hosts twice": b"name: a\ncommand: [b]\ncluster: {type: ssh, hosts: [{name: h}, {name: h}]}\n",
    "more nodes than hosts": b"name: a\ncommand: [b]\nnodes: 2\ncluster: {type: ssh, hosts: [{name: h}]}\n",
    "slots of some": b"name: a\ncommand: [b]\ncluster: {type: ssh, hosts: [{name: h}, {name: i, slots: 2}]}\n",
    "too few slots": b"name: a\ncommand: [b]\nparallel: {dp: 4}\ncluster: {type: ssh, hosts: [{name: h, slots: 3}]}\n",
}


def _resolved(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a key, references followed."""
    if "$ref" in found:
        return [SCHEMA["$defs"][found["$ref"].rpartition("/")[2]]]
    alternatives = [*found.get("anyOf", ()), *found.get("oneOf", ())]
    return [inner for each in alternatives for inner in _resolved(each)] or [found]


def _fields(block: dict[str, Any], path: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for name, found in block["properties"].items():
        here = f"{path}.{name}" if path else name
        alternatives = _resolved(found)
        yield here, alternatives
        for each in alternatives:
            if "properties" in each:
                yield from _fields(each, here)


def _blocks(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        yield path
        for key, inner in value.items():
            yield from _blocks(inner, f"{path}.{key}" if path else key)


def _legal_types(alternatives: list[dict[str, Any]]) -> set[str]:
    types: set[str] = set()
    for each in alternatives:
        kind = each.get("type", [])
        types |= {kind} if isinstance(kind, str) else set(kind)
        types |= {"integer"} if any(isinstance(choice, int) for choice in each.get("enum", ())) else set()
    return types


def _is(value: Any, kind: str) -> bool:
    kinds = {
        "integer": type(value) is int,
        "number": type(value) in (int, float) and value == value and abs(value) != float("inf"),
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
        "null": value is None,
    }
    return kinds[kind]


def _changed(path: str, value: Any) -> str:
    job = copy.deepcopy(FULL)
    *above, last = path.split(".")
    block = job
    for part in above:
        block[part] = block[part] if isinstance(block.get(part), dict) else {}
        block = block[part]
    block[last] = value
    text = json.dumps(job, indent=1, allow_nan=True)
    return text.replace("NaN", ".nan").replace("Infinity", ".inf")


def _unknown_keys() -> Iterator[tuple[str, str]]:
    free = ("env", "model.config", "sweep.grid", "secrets")
    for path in _blocks(FULL):
        if path not in free:
            yield f"unknown key in {path or 'the job'}", _changed(f"{path}.nodez".lstrip("."), 1)


def _wrong_types() -> Iterator[tuple[str, str]]:
    for path, alternatives in _fields(SCHEMA, ""):
        legal = _legal_types(alternatives)
        seen = set()
        for kind in sorted(legal & WRONG.keys()):
            for value in WRONG[kind]:
                small = isinstance(value, (int, float)) and not isinstance(value, bool) and value in (-5, -5.0, 2**70)
                if repr(value) not in seen and (small or not any(_is(value, each) for each in legal)):
                    seen.add(repr(value))
                    yield f"{path}={value!r}", _changed(path, value)


def _duplicates() -> Iterator[tuple[str, str]]:
    for key in FULL:
        yield f"duplicate {key}", EVERY_BLOCK + f"{key}: 1\n"


def _truncated() -> Iterator[tuple[str, str]]:
    for mark in "[{\"'&*!%@`":
        yield f"ends in {mark}", EVERY_BLOCK + f"zz: {mark}"


PATHS = [path for path, _ in _fields(SCHEMA, "")]
CASES: dict[str, str | bytes] = {
    **RAW,
    **dict(_unknown_keys()),
    **dict(_wrong_types()),
    **dict(_duplicates()),
    **dict(_truncated()),
}


def test_the_job_that_the_cases_break_is_sound(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    for text in (EVERY_BLOCK, json.dumps(FULL, indent=1)):
        file.write_text(text)
        assert load_job(file).job == Job.model_validate(FULL)


def test_there_are_hundreds_of_cases_for_every_block() -> None:
    assert len(CASES) >= 200
    assert len(list(_unknown_keys())) >= 24


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_job_is_refused_with_positions(case: str, refuse: Callable[..., list[str]]) -> None:
    for line in refuse(CASES[case]):
        where, _, message = line.partition(": ")
        assert POSITION.fullmatch(where), line
        assert message.isprintable(), line
        assert len(line) < 1000, line


@pytest.mark.parametrize("case", RAW)
def test_the_parser_without_libyaml_refuses_the_same(
    case: str, refuse: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_text, "_LOADER", yaml.SafeLoader)
    assert all(POSITION.fullmatch(line.partition(": ")[0]) for line in refuse(RAW[case]))


def test_the_exit_code_of_a_malformed_job_is_65(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: [")
    with pytest.raises(JobError) as caught:
        load_job(tmp_path / "job.yaml")
    assert caught.value.exit_code == 65


def _load_or_refuse(folder: Path, content: bytes) -> None:
    file = folder / "job.yaml"
    file.write_bytes(content)
    try:
        loaded = load_job(file)
    except JobError as error:
        places = [problem.where for problem in error.problems]
    else:
        places = []
        assert Job.model_validate(loaded.job.as_dict()) == loaded.job
    assert all(map(POSITION.fullmatch, places)), places


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_damage_to_a_sound_file_loads_or_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(EVERY_BLOCK.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        end = data.draw(st.integers(start, min(len(content), start + 30)))
        junk = data.draw(
            st.one_of(st.binary(max_size=8), st.sampled_from([b"[", b"{", b"&a ", b"*a", b"\t", b"- ", b": "]))
        )
        content[start:end] = junk
    _load_or_refuse(tmp_path, bytes(content))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    path=st.sampled_from(PATHS),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    ),
)
def test_any_value_of_any_key_loads_or_is_refused(path: str, value: Any, tmp_path: Path) -> None:
    _load_or_refuse(tmp_path, _changed(path, value).encode(errors="surrogatepass"))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    key=st.text(max_size=20) | st.sampled_from([path for path, _ in _fields(SCHEMA, "")]), value=st.text(max_size=30)
)
def test_any_override_loads_or_is_refused(key: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(EVERY_BLOCK)
    with contextlib.suppress(JobError):
        assert load_job(file, [f"{key}={value}"]).job.name
