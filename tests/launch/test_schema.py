"""JSON Schema and reference page are those of the models, and hold for jobs that load."""

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from meshwright.launch.load import load_job
from meshwright.launch.reference import reference_page
from meshwright.launch.schema import EXAMPLE_FILE, REFERENCE_FILE, ROOT, SCHEMA_FILE, job_schema, main

SCHEMA = job_schema()
JOBS = [*(ROOT / "examples").glob("*.yaml"), ROOT / EXAMPLE_FILE, Path(__file__).with_name("every_block.yaml")]
TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
KNOWN_WORDS = {
    *("$schema", "$defs", "$ref", "title", "description", "default", "type", "properties", "required"),
    *("additionalProperties", "anyOf", "oneOf", "enum", "const", "pattern", "items", "prefixItems"),
    *("minItems", "maxItems", "minProperties", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}


def misfits(value: Any, schema: dict[str, Any], at: str = "") -> list[str]:
    """What of a value breaks the part of JSON Schema that our schema uses."""
    if "$ref" in schema:
        return misfits(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], at)
    for word in ("anyOf", "oneOf"):
        if word in schema:
            tried = [misfits(value, each, at) for each in schema[word]]
            fits = sum(not each for each in tried)
            return [] if fits == 1 or (word == "anyOf" and fits) else [f"{at}: {fits} of {word}", *chain(*tried)]
    kinds = schema.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(
        isinstance(value, TYPES[kind]) and not (isinstance(value, bool) and kind != "boolean") for kind in kinds
    ):
        return [f"{at}: {value!r} is not {kinds}"]
    found = [f"{at}: {value!r}" for fits in _checks(value, schema) if not fits]
    if isinstance(value, list):
        inner = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        found += [text for n, each in enumerate(value) for text in misfits(each, inner[n], f"{at}.{n}")]
    if isinstance(value, dict):
        rest = schema.get("additionalProperties", True)
        for key, each in value.items():
            part = schema.get("properties", {}).get(key, rest)
            if part is False:
                found.append(f"{at}.{key}: unknown")
            elif part is not True:
                found += misfits(each, part, f"{at}.{key}")
        found += [f"{at}.{key}: missing" for key in schema.get("required", ()) if key not in value]
    return found


def _checks(value: Any, schema: dict[str, Any]) -> list[bool]:
    checks = [value in schema.get("enum", [value]), value == schema.get("const", value)]
    if isinstance(value, str):
        checks.append(re.search(schema.get("pattern", ""), value) is not None)
    if isinstance(value, (int, float)):
        checks += [value >= schema.get("minimum", value), value <= schema.get("maximum", value)]
    return checks


def test_the_files_in_docs_are_up_to_date() -> None:
    hint = "run `python -m meshwright.launch.schema --write`"
    example = (ROOT / EXAMPLE_FILE).read_text()
    assert json.loads((ROOT / SCHEMA_FILE).read_text()) == SCHEMA, hint
    assert (ROOT / REFERENCE_FILE).read_text() == reference_page(SCHEMA, example), hint


def test_the_example_of_the_reference_page_loads(tmp_path: Path) -> None:
    page = (ROOT / REFERENCE_FILE).read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    file = tmp_path / "job.yaml"
    file.write_text(block)
    assert load_job(file).job.num_ranks == 4


def test_every_link_of_the_reference_page_has_its_heading() -> None:
    page = (ROOT / REFERENCE_FILE).read_text()
    headings = {
        re.sub(r"[^a-z0-9_ -]", "", line.lower()).strip().replace(" ", "-") for line in re.findall("#+ (.*)", page)
    }
    assert set(re.findall(r"\(#([^)]*)\)", page)) <= headings


def test_every_key_of_the_schema_stands_on_the_page() -> None:
    page = (ROOT / REFERENCE_FILE).read_text()
    for block in (SCHEMA, *SCHEMA["$defs"].values()):
        assert all(f"| `{name}` |" in page for name in block["properties"])


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_the_schema_accepts_jobs_that_load(path: Path) -> None:
    loaded = load_job(path)
    assert misfits(yaml.safe_load(path.read_text().replace("1e-3", "0.001").replace("2e-3", "0.002")), SCHEMA) == []
    assert misfits(loaded.job.as_dict(), SCHEMA) == []


@pytest.mark.parametrize(
    "job",
    [{}, {"name": 3}, {"name": "a", "nodez": 1}, {"name": "a", "nodes": "two"}, {"name": "a", "train": {"steps": 1}}],
)
def test_the_schema_refuses_what_is_no_job(job: dict[str, Any]) -> None:
    assert misfits(job, SCHEMA) != []


def test_the_schema_uses_known_words_only() -> None:
    def words(node: Any) -> set[str]:
        if isinstance(node, list):
            return set().union(*map(words, node)) if node else set()
        if not isinstance(node, dict):
            return set()
        inner = [value for key, value in node.items() if key not in ("properties", "$defs", "default", "enum")]
        inner += [value for key in ("properties", "$defs") for value in node.get(key, {}).values()]
        return set(node) | words(inner)

    assert words(SCHEMA) <= KNOWN_WORDS


def test_the_schema_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
