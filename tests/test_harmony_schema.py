"""Tool parameters as TypeScript: as openai-harmony words them, and with nothing left out."""

import pytest

from mlx_gptoss.harmony import (
    DeveloperContent,
    RenderOptions,
    Schemas,
    ToolDescription,
    developer,
    function_tools,
    render_message,
)
from mlx_gptoss.harmony.schema import resolve_schema
from mlx_gptoss.harmony.typescript import compact_json, schema_type
from mlx_gptoss.vocabulary import load_vocabulary

PYDANTIC = {  # what pydantic 2 writes for a model with an Optional, an enum class and a submodel
    "$defs": {
        "Unit": {"enum": ["c", "f"], "title": "Unit", "type": "string"},
        "Place": {
            "properties": {"city": {"type": "string"}, "inside": {"$ref": "#/$defs/Place"}},
            "required": ["city"],
            "type": "object",
        },
    },
    "properties": {
        "place": {"$ref": "#/$defs/Place"},
        "unit": {"anyOf": [{"$ref": "#/$defs/Unit"}, {"type": "null"}], "default": None},
        "days": {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": "How many"},
        "level": {"enum": [1, 2, 3], "type": "integer"},
        "kind": {"const": "forecast"},
        "when": {"anyOf": [{"type": "string"}, {"type": "number"}, {"type": "null"}]},
    },
    "required": ["place"],
    "type": "object",
}

AS_OPENAI = """{
place: any,
unit?: any, // default: null
// How many
days?: any,
level?: number,
kind?: any,
when?: any,
}"""

RESOLVED = """{
place: {
    city: string,
    inside?: any,
    },
// Unit
//
unit?: "c" | "f" | null, // default: null
// How many
days?: number | null,
level?: 1 | 2 | 3,
kind?: "forecast",
when?:
 | string
 | number
 | null
,
}"""


def test_openai_wording_leaves_out_what_it_leaves_out() -> None:
    assert schema_type(PYDANTIC) == AS_OPENAI


def test_resolved_wording_says_it_all() -> None:
    assert schema_type(resolve_schema(PYDANTIC)) == RESOLVED


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"allOf": [{"type": "string"}]}, "string"),
        (
            {
                "allOf": [
                    {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
                    {"type": "object", "properties": {"b": {"type": "boolean"}}},
                ]
            },
            "{\na: 1,\nb?: boolean,\n}",
        ),
        ({"$ref": "#"}, "any"),
        ({"$ref": "#/$defs/missing"}, "any"),
        ({"$ref": "https://example.org/schema.json"}, "any"),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"type": "boolean"}}}, "boolean"),
        ({"type": "array", "items": {"anyOf": [{"type": "string"}]}}, "string[]"),
        ({"enum": ["x", 2, None]}, '"x" | 2 | null'),
        ({"type": "string", "enum": ["x", "y"]}, '"x" | "y"'),
        ({"anyOf": []}, "any"),
        ({"anyOf": [{"type": "null"}]}, "null"),
    ],
)
def test_resolving_one_thing(schema: dict, expected: str) -> None:
    assert schema_type(resolve_schema(schema)) == expected


def test_resolving_changes_nothing_of_the_caller() -> None:
    before = compact_json(PYDANTIC)
    resolve_schema(PYDANTIC)
    assert compact_json(PYDANTIC) == before


def test_option_selects_the_wording() -> None:
    tool = ToolDescription(name="forecast", description="Tells", parameters=PYDANTIC)
    message = developer(DeveloperContent(tools=(function_tools(tool),)))
    texts = [
        load_vocabulary().decode(render_message(message, options=RenderOptions(schemas=schemas)))
        for schemas in (Schemas.OPENAI, Schemas.RESOLVED)
    ]
    assert AS_OPENAI in texts[0]
    assert RESOLVED in texts[1]


def test_tools_without_parameters() -> None:
    """Three cases that look alike: no schema, an empty one, and an object without properties."""
    tools = (
        ToolDescription(name="a"),
        ToolDescription(name="b", parameters={}),
        ToolDescription(name="c", parameters={"type": "object", "properties": {}}),
    )
    text = load_vocabulary().decode(
        render_message(developer(DeveloperContent(tools=(function_tools(*tools),))))
    )
    assert "type a = () => any;\n\ntype b = (_: any) => any;\n\ntype c = (_: {\n}) => any;" in text
