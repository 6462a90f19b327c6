"""JSON schemas as the TypeScript that gpt-oss was trained to read.

The text equals what openai-harmony 0.0.8 (Apache-2.0, src/encoding.rs) writes, its oddities
included, because this is the text the models know: integers are `number`, enumerations are kept
for strings only, defaults and examples are comments, and `anyOf`, `allOf`, `const` and `$ref`
become `any`. `mlx_gptoss.harmony.schema` rewrites a schema so that those keep their meaning.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from mlx_gptoss.harmony.messages import ToolNamespace

_SIMPLE = {"number": "number", "integer": "number", "boolean": "boolean"}


def tools_section(namespaces: Iterable[ToolNamespace]) -> str:
    """Return the `# Tools` section of a system or developer message, namespaces by name."""
    ordered = sorted(namespaces, key=lambda namespace: namespace.name)
    return "\n\n".join(["# Tools", *(_namespace(namespace) for namespace in ordered)])


def schema_type(schema: Any, indent: str = "") -> str:
    """Return the TypeScript type of a JSON schema; what it does not understand is `any`."""
    if not isinstance(schema, Mapping):
        return "any"
    variants = schema.get("oneOf")
    if isinstance(variants, list):
        return "".join(_variant(variant, indent) for variant in variants)
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if _is_text(name)]
        if names:
            return " | ".join(names)
    if kind == "object":
        return _object(schema, indent)
    if kind == "string":
        return _string(schema)
    if kind == "array":
        items = schema.get("items", _MISSING)
        return "Array<any>" if items is _MISSING else f"{schema_type(items, indent)}[]"
    return _SIMPLE.get(kind, "any") if _is_text(kind) else "any"


_MISSING = object()


def _namespace(namespace: ToolNamespace) -> str:
    comment = "// " if namespace.tools else ""
    lines = [f"## {namespace.name}\n"]
    lines += [f"{comment}{line}" for line in _lines(namespace.description or "")]
    if namespace.tools:
        lines.append(f"namespace {namespace.name} {{\n")
        for tool in namespace.tools:
            lines += [f"// {line}" for line in _lines(tool.description)]
            arguments = "" if tool.parameters is None else f"_: {schema_type(tool.parameters)}"
            lines.append(f"type {tool.name} = ({arguments}) => any;\n")
        lines.append(f"}} // namespace {namespace.name}")
    return "\n".join(lines)


def _string(schema: Mapping[str, Any]) -> str:
    values = schema.get("enum")
    texts = [f'"{v}"' for v in values if _is_text(v)] if isinstance(values, list) else []
    return " | ".join(texts) or "string"


def _object(schema: Mapping[str, Any], indent: str) -> str:
    parts = []
    if _is_text(description := schema.get("description")):
        parts.append(f"{indent}// {description}\n")
    parts.append("{\n")
    properties, required = schema.get("properties"), schema.get("required")
    if isinstance(properties, Mapping):
        names = required if isinstance(required, list) else []
        for key, value in properties.items():
            label = key if key in names else f"{key}?"
            parts.append(_property(label, value if isinstance(value, Mapping) else {}, indent))
    parts.append(f"{indent}}}")
    return "".join(parts)


def _property(label: str, value: Mapping[str, Any], indent: str) -> str:
    variants = value.get("oneOf")
    head = _property_comments(value, indent)
    if isinstance(variants, list):
        return head + _union_property(label, value, variants, indent)
    text = _or_null(schema_type(value, f"{indent}    "), value)
    default = ""
    if "oneOf" not in value and "default" in value:
        default = f" // {_default(value)}"
    return f"{head}{indent}{label}: {text},{default}\n"


def _property_comments(value: Mapping[str, Any], indent: str) -> str:
    parts = []
    if _is_text(title := value.get("title")):
        parts.append(f"{indent}// {title}\n{indent}//\n")
    if "oneOf" not in value and _is_text(description := value.get("description")):
        parts.append(f"{indent}// {description}\n")
    examples = value.get("examples")
    if isinstance(examples, list) and examples:
        parts.append(f"{indent}// Examples:\n")
        parts += [f'{indent}// - "{example}"\n' for example in examples if _is_text(example)]
    return "".join(parts)


def _union_property(label: str, value: Mapping[str, Any], variants: list, indent: str) -> str:
    """Return a property of several types, one a line; a shared description is told once."""
    description = value.get("description") if _is_text(value.get("description")) else None
    first = variants[0] if variants and isinstance(variants[0], Mapping) else {}
    above = description is not None and first.get("description") != description
    parts = [f"{indent}// {description}\n"] if above else []
    if "default" in value:
        parts.append(f"{indent}// {_default(value)}\n")
    parts.append(f"{indent}{label}:\n")
    for number, variant in enumerate(variants):
        variant = variant if isinstance(variant, Mapping) else {}
        text = _or_null(schema_type(variant, f"{indent}   "), variant)
        notes = []
        told = variant.get("description")
        if _is_text(told) and told != description and not (number == 0 and above):
            notes.append(told)
        if "default" in variant:
            notes.append(_default(variant))
        comment = f" // {' '.join(notes)}" if notes else ""
        parts.append(f"{indent} | {text}{comment}\n")
    return "".join([*parts, f"{indent},\n"])


def _variant(variant: Any, indent: str) -> str:
    variant = variant if isinstance(variant, Mapping) else {}
    text = _or_null(schema_type(variant, f"{indent}   "), variant)
    notes = [variant["description"]] if _is_text(variant.get("description")) else []
    if "default" in variant:
        default = variant["default"]
        plain = _is_text(default) and not _has_enum(variant)
        notes.append(f'default: "{default}"' if plain else f"default: {compact_json(default)}")
    comment = f" // {' '.join(notes)}" if notes else ""
    return f"\n{indent} | {text}{comment}"


def _or_null(text: str, schema: Mapping[str, Any]) -> str:
    return f"{text} | null" if schema.get("nullable") is True and "null" not in text else text


def _default(schema: Mapping[str, Any]) -> str:
    default = schema["default"]
    if not _is_text(default):
        return f"default: {compact_json(default)}"
    return f"default: {default}" if _has_enum(schema) else f'default: "{default}"'


def _has_enum(schema: Mapping[str, Any]) -> bool:
    return isinstance(schema.get("enum"), list) and bool(schema["enum"])


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str)


def _lines(text: str) -> list[str]:
    r"""Split as Rust's `str::lines` does: at \n and \r\n; nothing follows a last line end."""
    *lines, last = text.split("\n")
    lines = [line.removesuffix("\r") for line in lines]
    return [*lines, last] if last else lines


def compact_json(value: Any) -> str:
    """Return JSON without spaces, numbers written as Rust's serde_json writes them."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_quoted(k)}:{compact_json(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(compact_json(item) for item in value) + "]"
    if isinstance(value, float):
        return _float(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return _float(float(value))
    return _quoted(value)


def _quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _float(value: float) -> str:
    """Write the shortest digits that read back, in Rust's form: 1e20, 1.5e-7, 0.00001, 2.0."""
    mantissa, _, exponent = f"{value!r}e0".partition("e")
    sign = "-" if mantissa.startswith("-") else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    fraction = "" if fraction == "0" else fraction
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent.partition("e")[0]) - len(whole + fraction) + len(digits)
    digits = digits.rstrip("0") or "0"
    if not -5 < point <= 16:
        rest = f".{digits[1:]}" if digits[1:] else ""
        return f"{sign}{digits[0]}{rest}e{point - 1}"
    if point <= 0:
        return f"{sign}0.{'0' * -point}{digits}" if digits != "0" else f"{sign}0.0"
    padded = digits.ljust(point, "0")
    return f"{sign}{padded[:point]}.{padded[point:] or '0'}"
