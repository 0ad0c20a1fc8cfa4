"""Turns what pydantic found into problems: where it was written, the dotted key, the value, what to write instead."""

import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from meshwright.launch.yaml_nodes import Found, Node, Scalar, Table, follow, show
from meshwright.parallel.errors import nearest

__all__ = ["explain", "known_keys"]

Location = tuple[str | int, ...]

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUND = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
}
_KINDS = {"<integer>": "an integer", "<text>": "text", "<list>": "a list", "<mapping>": "a mapping"}


def explain(error: ValidationError, root: Node, model: type[BaseModel]) -> list[Found]:
    """One (position, dotted key, message) per error of a validation.

    Args:
        error: from `model.model_validate(root.plain())`.
        root: the tree that was validated, with positions.
        model: the outermost block.
    """
    found: list[Found] = []
    for each in error.errors(include_url=False):
        found.extend(_explain_one(each, root, model))
    return found


def known_keys(model: type[BaseModel], location: Location) -> list[str]:
    """Legal keys of the block at a location, as YAML writes them.

    >>> from meshwright.launch.spec import Job
    >>> known_keys(Job, ("parallel",))[:3]
    ['pp', 'dp', 'fsdp']
    """
    blocks: list[type[BaseModel]] = [model]
    for part in location:
        if isinstance(part, str) and part.startswith("<"):  # the tag of a union: one of several blocks
            blocks = [block for block in blocks if part.strip("<>") in _types(block)] or blocks
            continue
        annotations = [
            field.annotation
            for block in blocks
            for name, field in block.model_fields.items()
            if (field.alias or name) == part
        ]
        blocks = [inner for annotation in annotations for inner in _blocks(annotation)] or blocks
    return [field.alias or name for block in blocks for name, field in block.model_fields.items()]


def _blocks(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _blocks(argument)


def _types(block: type[BaseModel]) -> tuple[object, ...]:
    """What `type:` of a block may be, of blocks that are told apart by it."""
    return get_args(block.model_fields["type"].annotation) if "type" in block.model_fields else ()


def _explain_one(each: Any, root: Node, model: type[BaseModel]) -> Iterable[Found]:
    kind, location = str(each["type"]), tuple(each["loc"])
    node, mark, keys = follow(root, location)
    key, last = ".".join(keys), str(location[-1]) if location else ""
    if kind == "job_rules":
        return [_rule(root, keys, *each_rule) for each_rule in each["ctx"]["problems"]]
    if kind == "missing":
        return [(mark, _join(key, last), f"required key is missing; add `{last}:`")]
    if kind == "extra_forbidden":
        return [(mark, key, f"unknown key {last!r}; {nearest(last, known_keys(model, location[:-1]))}")]
    if last == "[key]":
        return [(mark, key, f'{_message(each)}, got "{keys[-1]}"')]
    return [(mark if isinstance(node, Table) else node.mark, key, _wrong_value(each, node, keys))]


def _wrong_value(each: Any, node: Node, keys: tuple[str, ...]) -> str:
    kind, context = str(each["type"]), each.get("ctx") or {}
    expected = _expected(kind, each, context)
    if keys[:1] == ("secrets",) and isinstance(node, Scalar):  # a secret written down by mistake stays unseen
        return f"{expected}; write {{from_env: NAME}} or {{from_file: PATH}}"
    return f"{expected}, got {show(node)}{_hint(kind, node, context)}"


def _rule(root: Node, prefix: tuple[str, ...], *rule: str) -> Found:
    at, message = rule
    path = tuple(int(part) if part.isdecimal() else part for part in at.split(".")) if at else ()
    node, mark, _ = follow(root, (*prefix, *path))
    return (node.mark if isinstance(node, Scalar) else mark), _join(".".join(prefix), at), message


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _message(each: Any) -> str:
    return str(each["msg"]).removeprefix("Value error, ")


def _expected(kind: str, each: Any, context: dict[str, Any]) -> str:
    if kind in _BOUND:
        words, name = _BOUND[kind]
        return f"expected a number, {words} {context[name]}"
    if kind == "literal_error":
        return f"expected {context['expected']}"
    if kind in ("too_short", "too_long"):
        return _length(kind, context)
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        forms = [_KINDS[tag] for tag in re.findall(r"<\w+>", context.get("expected_tags", ""))]
        return f"expected {' or '.join(forms) or 'another kind of value'}"
    return f"expected {_EXPECTED[kind]}" if kind in _EXPECTED else _message(each)


def _length(kind: str, context: dict[str, Any]) -> str:
    words, name = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
    return f"expected {words} {context[name]} item{'s' if context[name] != 1 else ''}"


def _hint(kind: str, node: Node, context: dict[str, Any]) -> str:
    if not isinstance(node, Scalar):
        return '; quote text that starts with "{"' if isinstance(node, Table) and kind == "string_type" else ""
    if node.value is None:
        return "; give it a value or remove the key"
    if kind == "literal_error":
        hint = nearest(str(node.value), re.findall(r"'([^']*)'", context["expected"]))
        return f"; {hint}" if hint.startswith("did") else ""
    if kind == "string_type":
        return f'; write "{node.text}" in quotes'
    return _text_hint(kind, node.value) if isinstance(node.value, str) else ""


def _text_hint(kind: str, text: str) -> str:
    if kind == "bool_type" and text.lower() in ("yes", "no", "on", "off", "y", "n"):
        return f"; YAML 1.2 writes {'true' if text.lower() in ('yes', 'on', 'y') else 'false'}"
    if kind in ("int_type", "float_type") and re.fullmatch(r"[-+]?[0-9][0-9_,]*(\.[0-9]*)?([eE][-+]?[0-9]+)?", text):
        plain = text.replace("_", "").replace(",", "")
        return f"; write {plain} without {'quotes' if plain == text else 'separators'}"
    return ""
