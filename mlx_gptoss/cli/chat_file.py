"""Chats in files: what /save writes and /load reads."""

import contextlib
import json
import os
import stat
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_gptoss.errors import GptOssError
from mlx_gptoss.harmony import Message, ReasoningEffort, Role
from mlx_gptoss.vocabulary import N_VOCAB

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class SavedChat:
    """A chat as its file holds it.

    Attributes:
        date: When it began, as the model was told.
        reasoning: How long the model thinks.
        instructions: Stand above the chat.
        messages: What was said.
    """

    date: str | None
    reasoning: ReasoningEffort
    instructions: str | None
    messages: Sequence[Message]


def write_chat(path: Path, chat: SavedChat) -> None:
    """Write a chat, over an older one if need be, in one step.

    A new file is for its owner's eyes only, as caches of conversations and the history of what was
    typed are; an older one keeps its mode.

    Raises:
        GptOssError: The file exists and is no chat; it stays as it is.
        OSError: The disk refuses.
    """
    mode = 0o600
    if path.exists():
        _refuse_to_lose(path)
        mode = stat.S_IMODE(path.stat().st_mode)
    state = {
        "format": FORMAT,
        "date": chat.date,
        "reasoning": chat.reasoning,
        "system": chat.instructions,
        "messages": [asdict(message) for message in chat.messages],
    }
    part = path.with_name(f".{path.name}.part")
    try:
        part.unlink(missing_ok=True)  # of a killed writer; never filled under its old mode
        part.touch(mode=0o600, exist_ok=False)
        part.write_text(json.dumps(state, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        part.chmod(mode)
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def read_chat(path: Path) -> SavedChat:
    """Read what `write_chat` wrote.

    Raises:
        GptOssError: It is something else, or damaged.
        OSError: It cannot be read.
    """
    raw = path.read_bytes()
    try:
        state = json.loads(raw)
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise ValueError("no chat")
        return SavedChat(
            date=_text(state, "date"),
            reasoning=ReasoningEffort(state["reasoning"]),
            instructions=_text(state, "system"),
            messages=[
                _message(saved, f"messages[{i}]") for i, saved in enumerate(state["messages"])
            ],
        )
    except KeyError as error:
        raise GptOssError(_unexpected(path, f"no {error}")) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise GptOssError(_unexpected(path, str(error))) from error


def _refuse_to_lose(path: Path) -> None:
    try:
        read_chat(path)
    except GptOssError as error:
        raise GptOssError(f"{path}: exists and is no chat of /save; give another name") from error


def _unexpected(path: Path, what: str) -> str:
    return f"{path}: expected a chat of /save, format {FORMAT}, got another file ({what})"


def _message(saved: dict[str, Any], where: str) -> Message:
    """A message with every field checked: a wrong one would break the chat later."""
    texts = {
        key: _text(saved, key, where) for key in ("name", "channel", "recipient", "content_type")
    }
    role, content, sampled = Role(saved["role"]), saved["content"], saved.get("sampled")
    if role in (Role.SYSTEM, Role.DEVELOPER) or not isinstance(content, str):
        raise ValueError(f"{where}: role {role} with content {content!r:.40}")
    if role == Role.TOOL and texts["name"] is None:
        raise ValueError(f"{where}: a tool's without a name")
    if sampled is not None and not all(type(t) is int and 0 <= t < N_VOCAB for t in sampled):
        raise ValueError(f"{where}.sampled: other things than token ids")
    return Message(role, content, **texts, sampled=sampled and tuple(sampled))


def _text(saved: dict[str, Any], key: str, where: str = "chat") -> str | None:
    value = saved.get(key)
    if not isinstance(value, str | None):
        raise ValueError(f"{where}.{key}: {value!r:.40}")
    return value
