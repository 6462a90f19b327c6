"""What a message's header says, however the model wrote it.

A header as documented is `{role}[ to=RECIPIENT]<|channel|>CHANNEL[ to=RECIPIENT][ TYPE]`. About one
in twenty-five sampled by the 20b is not (llama.cpp's report 27720), so every part is looked for
where it has been seen, and text that is none of them is set aside, never taken for a recipient.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlx_gptoss.harmony.events import RepairKind
from mlx_gptoss.harmony.messages import Channel, Role
from mlx_gptoss.vocabulary import Special, load_vocabulary

Report = Callable[[RepairKind, str], None]

_NAME = r"[\w$-][\w.$-]*"
_TO = re.compile(rf"to=({_NAME})")
_BARE = re.compile(rf"(functions\.{_NAME})")
_ROLE = re.compile(rf"\s*({'|'.join(Role)})(?::({_NAME}))?")
_TOOL_AUTHOR = re.compile(rf"\s*({_NAME})\s*$")
_CHANNEL = re.compile(rf"\s*({'|'.join(Channel)})")
_WORD = re.compile(r"\s*([\w/+.-]+)\s*")
_PLAIN_TYPES = ("json", "code")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The parts of a header; None where it has none.

    Attributes:
        role: who wrote the message.
        name: of the author, after `role:`, or the whole name of a tool.
        recipient: whom it is addressed to, declared or not.
        channel: one of the three known ones.
        content_type: as in `Message.content_type`.
        text: what is none of these: junk, or the message itself if `<|message|>` is missing.
    """

    role: Role | None = None
    name: str | None = None
    recipient: str | None = None
    channel: Channel | None = None
    content_type: str | None = None
    text: str = ""


@dataclass
class _Sections:
    """A header's text, split at its control tokens; parts that were understood are cut out."""

    role: str = ""
    channels: list[str] = field(default_factory=list)
    constrained: str | None = None

    @property
    def rest(self) -> str:
        parts = [self.role, *self.channels, self.constrained or ""]
        return " ".join(part.strip() for part in parts if part.strip())


def read_header(tokens: Sequence[int], *, role: Role | None, report: Report) -> Header:
    """Return what a header says that `<|message|>` ended.

    Args:
        tokens: from behind `<|start|>` (or `<|start|>{role}`) to before `<|message|>`; ordinary
            tokens, `<|channel|>` and `<|constrain|>`.
        role: the role, if the prompt or its absence gave it already.
        report: is told of every repair.
    """
    sections = _split(tokens)
    recipient = _find_recipient(sections, _TO)
    role, name = _read_role(sections, role, addressed=recipient is not None, report=report)
    if recipient is None and (recipient := _find_recipient(sections, _BARE)) is not None:
        report(RepairKind.BARE_RECIPIENT, recipient)
    channel = _read_channel(sections, report)
    if channel is None and (found := _CHANNEL.match(sections.role)):
        channel = Channel(found[1])
        sections.role = sections.role[found.end() :]
        report(RepairKind.MISPLACED_CHANNEL, channel)
    content_type = _read_content_type(sections, addressed=recipient is not None)
    if text := sections.rest:
        report(RepairKind.HEADER_TEXT, text)
    return Header(
        role=role,
        name=name,
        recipient=recipient,
        channel=channel,
        content_type=content_type,
        text=text,
    )


def read_unfinished_header(tokens: Sequence[int], *, role: Role | None, report: Report) -> Header:
    """Return what a header says that ended without `<|message|>`: its `text` is the message.

    As the text follows without a mark, only what stands at the beginning of a section counts as a
    part of the header; words of the text are never taken for a channel or a recipient.
    """
    sections = _split(tokens)
    role, name = _read_role(sections, role, addressed=bool(sections.channels), report=report)
    channel = _read_channel(sections, report)
    recipient = None
    for find in _leading_recipients(sections):
        recipient = recipient or find
    content_type = None
    if sections.constrained is not None or recipient is not None:
        content_type = _read_leading_type(sections)
    return Header(
        role=role,
        name=name,
        recipient=recipient,
        channel=channel,
        content_type=content_type,
        text=sections.rest,
    )


def _split(tokens: Sequence[int]) -> _Sections:
    parts: list[tuple[int | None, bytearray]] = [(None, bytearray())]
    spelled = load_vocabulary().tokens
    for token in tokens:
        if token in (Special.CHANNEL, Special.CONSTRAIN):
            parts.append((token, bytearray()))
        else:
            parts[-1][1].extend(spelled[token])
    sections = _Sections()
    for mark, data in parts:
        text = data.decode("utf-8", errors="replace")
        if mark is None:
            sections.role = text
        elif mark == Special.CHANNEL:
            sections.channels.append(text)
        else:
            sections.constrained = (sections.constrained or "") + text
    return sections


def _find_recipient(sections: _Sections, pattern: re.Pattern[str]) -> str | None:
    """Find and cut out the first recipient anywhere in the header."""
    texts = [sections.role, *sections.channels, sections.constrained or ""]
    for place, text in enumerate(texts):
        if found := pattern.search(text):
            cut = f"{text[: found.start()]} {text[found.end() :]}"
            _replace(sections, place, cut)
            return found[1]
    return None


def _replace(sections: _Sections, place: int, text: str) -> None:
    if place == 0:
        sections.role = text
    elif place <= len(sections.channels):
        sections.channels[place - 1] = text
    else:
        sections.constrained = text


def _read_role(
    sections: _Sections, role: Role | None, *, addressed: bool, report: Report
) -> tuple[Role | None, str | None]:
    """Cut the role out; an unknown word in its place is a tool's name if it looks like one."""
    found = _ROLE.match(sections.role)
    if role is not None:
        if found and found[1] == role:
            sections.role = sections.role[found.end() :]
        return role, None
    if found:
        sections.role = sections.role[found.end() :]
        return Role(found[1]), found[2]
    author = _TOOL_AUTHOR.match(sections.role)
    if author and (addressed or "." in author[1]):
        sections.role = ""
        return Role.TOOL, author[1]
    report(RepairKind.NO_ROLE, sections.role.strip())
    return None, None


def _read_channel(sections: _Sections, report: Report) -> Channel | None:
    """Cut the known channels out and return the last one."""
    channel = None
    for place, text in enumerate(sections.channels):
        if found := _CHANNEL.match(text):
            channel = Channel(found[1])
            sections.channels[place] = text[found.end() :]
    if len(sections.channels) > 1:
        report(RepairKind.SEVERAL_CHANNELS, channel or "")
    return channel


def _read_content_type(sections: _Sections, *, addressed: bool) -> str | None:
    if sections.constrained is not None:
        return _read_leading_type(sections)
    if (word := _WORD.fullmatch(sections.rest)) and (addressed or word[1] in _PLAIN_TYPES):
        sections.role, sections.channels = "", []
        return word[1]
    return None


def _read_leading_type(sections: _Sections) -> str | None:
    if sections.constrained is not None:
        word = _WORD.match(sections.constrained)
        sections.constrained = sections.constrained[word.end() if word else 0 :]
        return Special.CONSTRAIN.spelling + (word[1] if word else "")
    for place, text in enumerate([sections.role, *sections.channels]):
        for plain in _PLAIN_TYPES:
            if text.lstrip().startswith(plain):
                _replace(sections, place, text.lstrip().removeprefix(plain))
                return plain
    return None


def _leading_recipients(sections: _Sections) -> list[str]:
    """Cut out the recipients that begin a section."""
    recipients = []
    for place, text in enumerate([sections.role, *sections.channels]):
        if found := re.match(rf"\s*{_TO.pattern}", text):
            _replace(sections, place, text[found.end() :])
            recipients.append(found[1])
    return recipients
