"""JSON schemas rewritten into the subset that the TypeScript renderer tells in full.

The renderer knows what openai-harmony knows, so a pydantic model's `Optional[...]` (an `anyOf`), a
shared definition (a `$ref`) or an integer enumeration reaches the model as `any` or `number`. The
rewriting puts the same meaning into words the renderer has:

    $ref            the definition in its place; a definition inside itself stays `any`
    anyOf           `oneOf`; with a null among two, the other one and `nullable`
    allOf           one schema; properties and required names of objects joined
    const, enum     a list of literal types, as a `type` list is written out as it stands
    null            the same, as the renderer knows no such type alone
"""

import json
from collections.abc import Mapping
from typing import Any


def resolve_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return an equivalent schema without `$ref`, `anyOf`, `allOf`, `const` and number enums.

    Args:
        schema: a JSON schema; its `#/...` references are looked up in itself.

    Returns:
        A new schema for `schema_type`. What cannot be resolved (a reference to another document or
        to itself, a missing definition) is an empty schema, which is told as `any`.
    """
    return _resolve(schema, root=schema, open_refs=frozenset())


def _resolve(schema: Any, *, root: Mapping[str, Any], open_refs: frozenset[str]) -> dict[str, Any]:
    if not isinstance(schema, Mapping):
        return {}
    schema = dict(schema)
    if isinstance(reference := schema.pop("$ref", None), str):
        target = None if reference in open_refs else _look_up(reference, root)
        inner = _resolve(target, root=root, open_refs=open_refs | {reference})
        return inner | _resolve(schema, root=root, open_refs=open_refs) if schema else inner

    def resolve(part: Any) -> dict[str, Any]:
        return _resolve(part, root=root, open_refs=open_refs)

    if isinstance(parts := schema.pop("allOf", None), list):
        schema = _joined([*map(resolve, parts), schema])
    if isinstance(variants := schema.pop("anyOf", schema.pop("oneOf", None)), list):
        schema = _union(list(map(resolve, variants)), schema)
    if isinstance(properties := schema.get("properties"), Mapping):
        schema["properties"] = {key: resolve(value) for key, value in properties.items()}
    if "items" in schema:
        schema["items"] = resolve(schema["items"])
    return _with_literals(schema)


def _look_up(reference: str, root: Mapping[str, Any]) -> Any:
    if not reference.startswith("#"):
        return None
    found: Any = root
    for step in reference.lstrip("#").strip("/").split("/") if reference != "#" else []:
        step = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or step not in found:
            return None
        found = found[step]
    return found


def _joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one schema for `allOf`: later words win, properties and required names add up."""
    joined: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    required: list[str] = []
    for part in parts:
        joined |= part
        properties |= part.get("properties") or {}
        required += part.get("required") or []
    if properties:
        joined |= {"properties": properties, "required": required}
    return joined


def _union(variants: list[dict[str, Any]], around: dict[str, Any]) -> dict[str, Any]:
    others = [variant for variant in variants if variant.get("type") != _NULL]
    if len(others) == 1 and len(others) < len(variants):
        return others[0] | around | {"nullable": True}
    return {**around, "oneOf": variants} if len(variants) > 1 else (variants or [{}])[0] | around


_NULL = ["null"]


def _with_literals(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type") == "null":
        return {**schema, "type": _NULL}
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list) or not values:
        return schema
    if schema.get("type") == "string" and "const" not in schema:
        return schema
    literals = [json.dumps(value, ensure_ascii=False) for value in values]
    return {**schema, "type": literals}
