"""Checks manifests without a cluster: strictly, against the schemas of the catalog, with the place of every fault.

Only the words that Kubernetes' structural schemas use are known; a schema with another one is refused, not ignored.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from meshwright.parallel.errors import nearest

__all__ = ["faults", "schema_of"]

_CATALOG = Path(__file__).with_name("catalog")
_TYPES: dict[str, Callable[[object], bool]] = {
    "object": lambda value: isinstance(value, Mapping),
    "array": lambda value: isinstance(value, list | tuple),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}
_WORDS = {
    *("type", "required", "properties", "additionalProperties", "items", "enum", "pattern", "minimum", "maximum"),
    *("maxLength", "minLength", "minItems", "maxItems", "anyOf", "format", "x-kubernetes-int-or-string"),
}


@cache
def schema_of(kind: str) -> Mapping[str, Any]:
    """The schema of a kind of object: "JobSet" or "TrainJob".

    >>> schema_of("JobSet")["properties"]["kind"]["enum"]
    ['JobSet']
    """
    import yaml

    found: Mapping[str, Any] = yaml.safe_load((_CATALOG / f"{kind.lower()}.yaml").read_text())
    return found


def faults(value: object, schema: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Everything about a value that its schema does not allow.

    >>> schema = {"properties": {"nodes": {"type": "integer"}}, "additionalProperties": False}
    >>> list(faults({"nodes": "2", "node": 1}, schema))
    ["node: there is no such key; did you mean 'nodes'?", "nodes: expected integer, got '2'"]
    """
    unknown = set(schema) - _WORDS
    assert not unknown, f"{where}: schema words {unknown}"
    place = where or "the object"
    if "anyOf" in schema and not any(not list(faults(value, each, where)) for each in schema["anyOf"]):
        yield f"{place}: {value!r} is none of {', '.join(each['type'] for each in schema['anyOf'])}"
    elif "type" in schema and not _TYPES[schema["type"]](value):
        yield f"{place}: expected {schema['type']}, got {value!r}"
        return
    yield from (f"{place}: {said}" for said in _bounds(value, schema))
    if isinstance(value, Mapping):
        yield from _keys(value, schema, where)
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from faults(each, schema.get("items", {}), f"{where}[{index}]")


def _bounds(value: object, schema: Mapping[str, Any]) -> Iterator[str]:
    if "enum" in schema and value not in schema["enum"]:
        yield f"{value!r} is none of {', '.join(map(str, schema['enum']))}"
    if isinstance(value, str):
        if "pattern" in schema and not re.search(schema["pattern"], value):
            yield f"{value!r} does not match {schema['pattern']}"
        yield from _range(len(value), schema, "Length")
    elif isinstance(value, int | float):
        yield from _range(value, schema, "imum")
    elif isinstance(value, list | tuple):
        yield from _range(len(value), schema, "Items")


def _range(number: float, schema: Mapping[str, Any], of: str) -> Iterator[str]:
    unit = {"Length": " characters", "Items": " items", "imum": ""}[of]
    least, most = schema.get(f"min{of}"), schema.get(f"max{of}")
    if least is not None and number < least:
        yield f"{number}{unit} is less than {least}"
    if most is not None and number > most:
        yield f"{number}{unit} is more than {most}"


def _keys(value: Mapping[str, Any], schema: Mapping[str, Any], where: str) -> Iterator[str]:
    known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    for key in schema.get("required", ()):
        if key not in value:
            yield f"{where or 'the object'}: {key} is missing"
    for key in sorted(value):
        place = f"{where}.{key}" if where else key
        if key in known:
            yield from faults(value[key], known[key], place)
        elif more is False:
            yield f"{place}: there is no such key; {nearest(key, list(known))}"
        elif isinstance(more, Mapping):
            yield from faults(value[key], more, place)
