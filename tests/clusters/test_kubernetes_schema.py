"""The strict check of manifests."""

import pytest

from meshwright.clusters.kubernetes_schema import faults, schema_of

SCHEMA = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
        "count": {"type": "integer", "minimum": 1},
        "each": {"type": "array", "minItems": 1, "items": {"type": "boolean"}},
        "free": {"type": "object", "additionalProperties": {"anyOf": [{"type": "integer"}, {"type": "string"}]}},
        "kind": {"type": "string", "enum": ["A", "B"]},
    },
}


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({}, "the object: name is missing"),
        ({"name": 3}, "name: expected string, got 3"),
        ({"name": "A1"}, "name: 'A1' does not match"),
        ({"name": "abcdef"}, "name: 6 characters is more than 5"),
        ({"name": "a", "count": "3"}, "count: expected integer, got '3'"),
        ({"name": "a", "count": True}, "count: expected integer, got True"),
        ({"name": "a", "count": 0}, "count: 0 is less than 1"),
        ({"name": "a", "each": []}, "each: 0 items is less than 1"),
        ({"name": "a", "each": [True, 1]}, "each[1]: expected boolean, got 1"),
        ({"name": "a", "free": {"x": 1.5}}, "free.x: 1.5 is none of integer, string"),
        ({"name": "a", "kind": "C"}, "kind: 'C' is none of A, B"),
        ({"name": "a", "cuont": 1}, "cuont: there is no such key; did you mean 'count'?"),
    ],
)
def test_each_fault_is_found_with_its_place(value: object, fault: str) -> None:
    found = list(faults(value, SCHEMA))
    assert len(found) == 1
    assert found[0].startswith(fault)


def test_what_is_right_passes_and_words_that_are_not_known_are_not_passed_over() -> None:
    assert list(faults({"name": "a", "each": [True], "free": {"x": 1, "y": "z"}, "kind": "A"}, SCHEMA)) == []
    with pytest.raises(AssertionError, match="oneOf"):
        list(faults(1, {"oneOf": []}))


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob"])
def test_the_schemas_of_the_catalog_are_strict_at_every_level(kind: str) -> None:
    def strict(schema: dict[str, object], where: str) -> None:
        properties = schema.get("properties", {})
        assert isinstance(properties, dict)
        if properties:
            assert schema["additionalProperties"] is False, where
        for name, each in properties.items():
            strict(each, f"{where}.{name}")
        items = schema.get("items")
        if isinstance(items, dict):
            strict(items, f"{where}[]")

    strict(dict(schema_of(kind)), kind)
