"""The reference page of job files, made from the JSON Schema: an example, then one table per block."""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from meshwright.launch.spec.block import DURATION_PATTERN
from meshwright.launch.spec.conduct import Conduct
from meshwright.launch.spec.job import Program
from meshwright.launch.spec.machines import Placement
from meshwright.launch.spec.training import Training

__all__ = ["reference_page"]

_GROUPS = (
    ("What runs", Program),
    ("What it trains", Training),
    ("Where it runs", Placement),
    ("How it behaves", Conduct),
)
_HEAD = """# Job files

<!-- Made by `python -m meshwright.launch.schema --write` from launch/spec; do not edit. -->

A job is one YAML file. It names what to run (`command:`) or what to train (`model:`, `data:`, `train:`), the mesh it
runs on (`parallel:`) and the cluster that runs it. Only `name` and one of `command` and `model` are required.

- Scalars follow YAML 1.2: `24:00:00`, `on` and `no` are text, `017` is seventeen, `1e-5` is a number.
- Values are never converted: `"2"` is no integer and `true` is no number. A number is taken where a float is expected.
- Durations carry a unit: `250ms`, `90s`, `10m`, `24h`, `1h30m`. Sizes do too: `4MiB`, `900GiB`, `1.5GB`.
- Duplicate keys, unknown keys, tags, merge keys (`<<`) and several documents in one file are errors.
- Every error names file, line, column and key; all errors of a file are reported at once, with exit code 65.
- `--set key=value` replaces one key: `--set parallel.dp=4`, `--set 'command=[python, train.py]'`.

[job.schema.json](job.schema.json) is the same as JSON Schema, for editors.

## Example

```yaml
"""


def reference_page(schema: Mapping[str, Any], example: str) -> str:
    """The Markdown page.

    Args:
        schema: from `job_schema()`.
        example: text of a job, shown on top.
    """
    parts = [_HEAD + example + "```\n"]
    for title, group in _GROUPS:
        names = [field.alias or name for name, field in group.model_fields.items()]
        parts.append(f"## {title}\n\n{_table(schema, schema, '', *names)}")
        for name in names:
            parts.extend(_sections(schema, schema["properties"][name], name))
    return "\n".join(parts)


def _sections(schema: Mapping[str, Any], found: Mapping[str, Any], path: str) -> Iterator[str]:
    for reference in _references(found):
        block = schema["$defs"][reference]
        yield f"### `{path}`{_type_of(reference)}\n\n{block['description']}\n\n{_table(schema, block, path)}"
        for name, inner in block["properties"].items():
            yield from _sections(schema, inner, f"{path}.{name}")


def _type_of(reference: str) -> str:
    """What tells blocks of one key apart in their titles: " (ssh)" of SshCluster."""
    kind = reference.rpartition("/")[2].removesuffix("Cluster")
    return f" ({kind.lower()})" if reference.endswith("Cluster") else ""


def _references(found: Mapping[str, Any]) -> list[str]:
    if "$ref" in found:
        return [found["$ref"].rpartition("/")[2]]
    inner = [*found.get("anyOf", ()), *found.get("oneOf", ())]
    inner += [found[key] for key in ("additionalProperties", "items") if isinstance(found.get(key), dict)]
    return [name for each in inner for name in _references(each)]


def _table(schema: Mapping[str, Any], block: Mapping[str, Any], path: str, *only: str) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name in only or block["properties"]:
        found = block["properties"][name]
        cells = (f"`{name}`", _words(found, f"{path}.{name}" if path else name), _default(name, found, block))
        rows.append("| " + " | ".join((*cells, _meaning(schema, found))) + " |")
    return "\n".join(rows) + "\n"


def _meaning(schema: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    # pydantic leaves a description out where the block says the same words
    text = found.get("description") or schema["$defs"][_references(found)[0]]["description"]
    return str(text).replace("|", "\\|")


def _default(name: str, found: Mapping[str, Any], block: Mapping[str, Any]) -> str:
    if name in block.get("required", ()):
        return "**required**"
    if found.get("default") is None:
        return "-"
    value = found["default"]
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _words(found: Mapping[str, Any], path: str) -> str:
    """What a value may be, in words: "integer, at least 1"."""
    alternatives = [*found.get("anyOf", ()), *found.get("oneOf", ())]
    if alternatives:
        return " or ".join(dict.fromkeys(_words(each, path) for each in alternatives if each != {"type": "null"}))
    if "$ref" in found:
        kind = _type_of(found["$ref"])
        return f"[block{kind}](#{_anchor(path + kind)})"
    if "const" in found:
        return f"`{found['const']}`"
    if "enum" in found:
        return ", ".join(f"`{each}`" for each in found["enum"])
    return _kind(found, path)


def _kind(found: Mapping[str, Any], path: str) -> str:
    kind = found.get("type", "any value")
    if isinstance(kind, list):
        return "size"
    if kind == "string":
        return "duration" if found.get("pattern") == DURATION_PATTERN else "text"
    if kind == "array":
        return _list(found, path)
    if kind == "object":
        inner = found.get("additionalProperties")
        return f"mapping of {_words(inner, path)}" if isinstance(inner, dict) else "mapping"
    return f"{'true or false' if kind == 'boolean' else kind}{_bounds(found)}"


def _list(found: Mapping[str, Any], path: str) -> str:
    if "prefixItems" in found:
        return f"list of {len(found['prefixItems'])}: {_words(found['prefixItems'][0], path)}"
    return f"list of {_words(found.get('items', {}), path)}"


def _bounds(found: Mapping[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most", "exclusiveMaximum": "below"}
    shown = [f"{word} {found[key]}" for key, word in words.items() if key in found and found[key] != 1_000_000_000]
    return f", {', '.join(shown)}" if shown else ""


def _anchor(path: str) -> str:
    return re.sub(r"[^a-z0-9_ -]", "", path.lower()).replace(" ", "-")
