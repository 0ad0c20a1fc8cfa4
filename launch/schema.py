"""The JSON Schema of a job, made from its models; `python -m meshwright.launch.schema --write` refreshes the reference.

Editors that know JSON Schema check a job while it is typed. The loader knows more: rules between keys, and positions.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meshwright.launch.spec.block import DURATION_PATTERN
from meshwright.launch.spec.job import Job
from meshwright.launch.values import format_duration

__all__ = ["SCHEMA_FILE", "job_schema", "main"]

ROOT = Path(__file__).resolve().parents[1]
SCHEMA_FILE = "docs/reference/job.schema.json"
REFERENCE_FILE = "docs/reference/job.md"
EXAMPLE_FILE = "docs/reference/job.example.yaml"


def job_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a job file.

    >>> job_schema()["properties"]["parallel"]["$ref"]
    '#/$defs/Parallel'
    """
    made = _tidy(Job.model_json_schema(by_alias=True, mode="validation"), names=False)
    cluster = made["properties"]["cluster"]
    made["properties"]["cluster"] = {
        "description": cluster["description"],
        "anyOf": [{"type": "string"}, *cluster["oneOf"]],
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "meshwright job", **made}


def _tidy(node: Any, *, names: bool) -> Any:
    """Drops the titles pydantic makes from names, and writes defaults as a job would.

    Args:
        node: a part of the schema.
        names: whether the keys of this part are names of fields, which stay whatever they are.
    """
    if isinstance(node, list):
        return [_tidy(each, names=False) for each in node]
    if not isinstance(node, dict):
        return node
    kept = {
        key: _tidy(value, names=not names and key in ("properties", "$defs"))
        for key, value in node.items()
        if names or key != "title"
    }
    if not names and kept.get("pattern") == DURATION_PATTERN and "default" in kept:
        kept["default"] = format_duration(kept["default"])
    return kept


def main(arguments: Sequence[str]) -> int:
    """Writes the schema to standard output, or with --write schema and reference page into docs/reference."""
    text = json.dumps(job_schema(), indent=2) + "\n"
    if list(arguments) == ["--write"]:
        from meshwright.launch.reference import reference_page

        example = (ROOT / EXAMPLE_FILE).read_text()
        (ROOT / SCHEMA_FILE).write_text(text)
        (ROOT / REFERENCE_FILE).write_text(reference_page(job_schema(), example))
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
