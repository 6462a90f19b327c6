"""2,000 generated conversations: the same tokens as openai-harmony 0.0.8, and the same messages.

Two differences are deliberate. Which old analysis is dropped follows the models' rule, not the
oracle's, so both render what our rule left, and the oracle drops nothing. A content type without
a recipient is a recipient to the oracle (`final <|constrain|>json` becomes a call), so parsing is
compared on headers without that.
"""

import functools
import random
from dataclasses import replace
from typing import Any

import openai_harmony as upstream
import pytest
from harmony_oracle import oracle

from mlx_gptoss.harmony import (
    BROWSER,
    PYTHON,
    Channel,
    DeveloperContent,
    Message,
    OldAnalysis,
    ReasoningEffort,
    RenderOptions,
    Role,
    SystemContent,
    ToolDescription,
    ToolNamespace,
    render_conversation,
    render_conversation_for_completion,
    render_conversation_for_training,
)
from mlx_gptoss.harmony.events import RepairKind
from mlx_gptoss.harmony.frames import Framer
from mlx_gptoss.harmony.header import Header
from mlx_gptoss.harmony.render import without_old_analysis
from mlx_gptoss.vocabulary import Special, load_vocabulary, special_spelling

KEEP = RenderOptions(old_analysis=OldAnalysis.KEEP)
BATCHES, PER_BATCH = 20, 100
ALPHABET = "abc XYZ 019.,;:!?'\"`\\/|<>{}[]()_-+=*&^%$#@~\n\t\r"
UNICODE = "éßñ漢字かなЖשلा🙂👨‍👩‍👧🇺🇸\u0301\u200b\u2028\x7f\x00\ufffd\U0010ffff"
WORDS = "the weather in Tokyo is fine while JSON schemas and 12345 tokens differ".split()
NAMES = ["get_weather", "add", "lookup", "f", "kitchenSink", "a_1"]


def text(rng: random.Random) -> str:
    """A message's text: words, symbols, other scripts, spellings of control tokens, nothing."""
    pieces = []
    for _ in range(rng.randrange(6)):
        pick = rng.random()
        if pick < 0.5:
            pieces.append(" ".join(rng.choices(WORDS, k=rng.randrange(1, 12))))
        elif pick < 0.7:
            pieces.append("".join(rng.choices(ALPHABET, k=rng.randrange(1, 20))))
        elif pick < 0.9:
            pieces.append("".join(rng.choices(UNICODE, k=rng.randrange(1, 8))))
        else:
            pieces.append(special_spelling(rng.choice([*Special, 200013, 201087])))
    return rng.choice(["", " ", "\n"]).join(pieces)


def value(rng: random.Random) -> Any:
    """A JSON value for a default or an example."""
    number = rng.choice([1.0, 0.1, -2.5, 1e20, 1.5e-7, 1e-5, 1e16, 12345678.25, 3.0e15, -0.0])
    return rng.choice([number, rng.randrange(-9, 10**6), True, None, text(rng), [1, "a"], {"k": 2}])


def schema(rng: random.Random, depth: int = 3) -> Any:
    """A JSON schema with everything the renderer knows, and much that it does not."""
    kinds = ["string", "number", "integer", "boolean", "null", "enum", "list", "odd"]
    kind = rng.choice(kinds + (["object", "object", "array", "oneOf"] if depth else []))
    found: dict[str, Any] = {"type": kind}
    if kind == "enum":
        found = {
            "type": rng.choice(["string", "integer"]),
            "enum": rng.choice([["a", "b"], [1], []]),
        }
    elif kind == "list":
        found["type"] = rng.choices(["string", "integer", "null", "object", 3], k=rng.randrange(4))
    elif kind == "odd":
        found = rng.choice([{}, {"anyOf": [{}]}, {"$ref": "#/a"}, {"const": 1}, {"type": 5}, True])
    elif kind == "object":
        keys = rng.sample(["city", "unit", "n", "über", "with space"], rng.randrange(4))
        found["properties"] = {key: schema(rng, depth - 1) for key in keys}
        found |= rng.choice([{}, {"required": keys[:1]}, {"required": [*keys, 7]}])
    elif kind == "array":
        found |= rng.choice([{}, {"items": schema(rng, depth - 1)}])
    elif kind == "oneOf":
        found = {"oneOf": [schema(rng, depth - 1) for _ in range(rng.randrange(4))]}
    if isinstance(found, dict):
        extras = {
            "description": text(rng),
            "title": text(rng),
            "default": value(rng),
            "nullable": rng.random() < 0.5,
            "examples": [value(rng) for _ in range(rng.randrange(3))],
        }
        found |= {key: extras[key] for key in extras if rng.random() < 0.25}
        if "oneOf" in found and found["oneOf"] and rng.random() < 0.3:
            first = found["oneOf"][0]
            if isinstance(first, dict) and "description" in first:
                found["description"] = first["description"]
    return found


def namespace(rng: random.Random, name: str) -> ToolNamespace:
    tools = tuple(
        ToolDescription(
            name=tool,
            description=text(rng),
            parameters=rng.choice(
                [None, {}, _dict(schema(rng)), {"type": "object"} | _object(rng)]
            ),
        )
        for tool in rng.sample(NAMES, rng.randrange(4))
    )
    return ToolNamespace(name=name, description=rng.choice([None, text(rng)]), tools=tools)


def _dict(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _object(rng: random.Random) -> dict[str, Any]:
    keys = rng.sample(["city", "unit", "days"], rng.randrange(1, 4))
    return {"properties": {key: schema(rng) for key in keys}, "required": keys[1:]}


def system_message(rng: random.Random) -> Message:
    tools = rng.sample([BROWSER, PYTHON, namespace(rng, "other")], rng.randrange(4))
    content = SystemContent(
        identity=rng.choice([SystemContent().identity, None, text(rng)]),
        knowledge_cutoff=rng.choice(["2024-06", None, "2021-01"]),
        date=rng.choice([None, "2025-06-28"]),
        effort=rng.choice([None, *ReasoningEffort]),
        tools=tuple(tools),
        channels=rng.choice([(), ("analysis", "final"), tuple(Channel)]),
    )
    return Message(Role.SYSTEM, content)


def developer_message(rng: random.Random) -> Message:
    names = rng.sample(["functions", "calendar"], rng.randrange(3))
    content = DeveloperContent(
        instructions=rng.choice([None, text(rng)]),
        tools=tuple(namespace(rng, name) for name in names),
    )
    return Message(Role.DEVELOPER, content)


def chat_message(rng: random.Random) -> Message:
    role = rng.choice([Role.USER, *[Role.ASSISTANT] * 4, Role.TOOL])
    if role == Role.USER:
        return Message(role, text(rng), name=rng.choice([None, None, "bob"]))
    called = rng.choice([f"functions.{rng.choice(NAMES)}", "browser.search", "python"])
    if role == Role.TOOL:
        recipient = rng.choice([Role.ASSISTANT, "all", None])
        channel = rng.choice([None, *Channel])
        return Message(role, text(rng), name=called, recipient=recipient, channel=channel)
    if rng.random() < 0.3:
        kind = rng.choice([None, "json", "code", "<|constrain|>json", "<|constrain|>"])
        channel = rng.choice(list(Channel))
        return Message(role, text(rng), recipient=called, channel=channel, content_type=kind)
    return Message(role, text(rng), channel=rng.choice([None, *Channel, *Channel]))


@functools.cache
def conversation(seed: int) -> list[Message]:
    rng = random.Random(seed)
    head = [m for m in (system_message(rng), developer_message(rng)) if rng.random() < 0.7]
    return head + [chat_message(rng) for _ in range(rng.randrange(9))]


def upstream_tools(namespaces: tuple[ToolNamespace, ...]) -> dict[str, Any] | None:
    return {
        space.name: upstream.ToolNamespaceConfig(
            name=space.name,
            description=space.description,
            tools=[
                upstream.ToolDescription.new(
                    tool.name,
                    tool.description,
                    parameters=tool.parameters,  # pyright: ignore
                )
                for tool in space.tools
            ],
        )
        for space in namespaces
    } or None


def to_upstream(message: Message) -> upstream.Message:
    """The oracle's message of one of ours."""
    content: Any = message.content
    if isinstance(content, SystemContent):
        channels = list(content.channels)
        content = upstream.SystemContent(
            model_identity=content.identity,
            knowledge_cutoff=content.knowledge_cutoff,
            conversation_start_date=content.date,
            reasoning_effort=content.effort and upstream.ReasoningEffort[content.effort.upper()],
            tools=upstream_tools(content.tools),
            channel_config=upstream.ChannelConfig.require_channels(channels),
        )
    elif isinstance(content, DeveloperContent):
        content = upstream.DeveloperContent(
            instructions=content.instructions, tools=upstream_tools(content.tools)
        )
    author = upstream.Author(role=upstream.Role(message.role), name=message.name)
    theirs = upstream.Message.from_author_and_content(author, content)
    theirs.channel, theirs.recipient = message.channel, message.recipient
    theirs.content_type = message.content_type
    return theirs


@pytest.mark.parametrize("batch", range(BATCHES))
def test_conversations_render_to_the_same_tokens(batch: int) -> None:
    keep = upstream.RenderConversationConfig(auto_drop_analysis=False)
    for seed in range(batch * PER_BATCH, (batch + 1) * PER_BATCH):
        ours = conversation(seed)
        kept = without_old_analysis(ours)
        theirs = upstream.Conversation.from_messages([to_upstream(m) for m in kept])
        everything = upstream.Conversation.from_messages([to_upstream(m) for m in ours])
        assert render_conversation_for_completion(
            ours
        ) == oracle().render_conversation_for_completion(
            theirs, upstream.Role.ASSISTANT, config=keep
        ), f"seed {seed}"
        assert render_conversation_for_training(
            ours, options=KEEP
        ) == oracle().render_conversation_for_training(everything, config=keep), f"seed {seed}"


class Collector:
    """Messages of a whole conversation, as the framer finds them."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def on_header(self, header: Header) -> None:
        self.header, self.texts = header, list[str]()

    def on_text(self, text: str) -> None:
        self.texts.append(text)

    def on_end(self, end: int | None, tokens: tuple[int, ...]) -> None:
        found = self.header
        assert found.role is not None
        assert not found.text
        self.messages.append(
            Message(
                found.role,
                "".join(self.texts),
                name=found.name,
                channel=found.channel,
                recipient=found.recipient,
                content_type=found.content_type,
            )
        )

    def on_stop(self, stop: int) -> None:
        pass

    def on_repair(self, kind: RepairKind, detail: str) -> None:
        raise AssertionError(f"{kind} in a well-formed conversation: {detail!r}")


def parsed(tokens: list[int]) -> list[Message]:
    collector = Collector()
    framer = Framer(collector, role=None)
    for token in tokens:
        framer.feed(token)
    framer.finish()
    return collector.messages


def comparable(messages: list[Message]) -> list[Message]:
    """Messages that the oracle parses back at all: it knows no names of users, no bare authors."""
    found = []
    for message in messages:
        if message.role == Role.TOOL and message.recipient in (None, "all"):
            message = replace(message, recipient=Role.ASSISTANT)
        if message.role == Role.USER:
            message = replace(message, name=None)
        if isinstance(message.content, str):
            found.append(message)
    return found


@pytest.mark.parametrize("batch", range(BATCHES))
def test_well_formed_streams_parse_to_the_same_messages(batch: int) -> None:
    for seed in range(batch * PER_BATCH, (batch + 1) * PER_BATCH):
        messages = comparable(conversation(seed))
        tokens = render_conversation(messages, options=KEEP)
        theirs = oracle().parse_messages_from_completion_tokens(tokens, role=None)
        ours = parsed(tokens)
        assert [to_upstream(message) for message in ours] == theirs, f"seed {seed}"
        assert ours == [replace(m, content=visible(m)) for m in messages], f"seed {seed}"


def visible(message: Message) -> str:
    """A message's text as its tokens hold it."""
    return load_vocabulary().decode(load_vocabulary().encode(str(message.content)))
