"""A stream of tokens cut into messages: header, text, end.

This layer knows the frame of harmony and nothing of what a message means for a turn; `parse`
decides that. It is total: every sequence of integers is accepted, and what does not fit is
reported to the sink, not raised. Every ordinary token ends up in a header or in a text.
"""

from enum import Enum
from typing import Protocol

from mlx_gptoss.harmony.events import RepairKind
from mlx_gptoss.harmony.header import Header, read_header, read_unfinished_header
from mlx_gptoss.harmony.messages import Role
from mlx_gptoss.vocabulary import N_TEXT, Special, TextDecoder, load_vocabulary

STOP_TOKENS = (int(Special.RETURN), int(Special.CALL), int(Special.ENDOFTEXT))
"""Tokens that end a turn: `<|return|>`, `<|call|>` and, never right but seen, `<|endoftext|>`."""

_START = int(Special.START)
_ENDS = frozenset((*STOP_TOKENS, int(Special.END)))


class FrameSink(Protocol):
    """What a `Framer` tells about a stream, in order; see `parse.HarmonyParser`."""

    def on_header(self, header: Header) -> None:
        """A message begins."""
        ...

    def on_text(self, text: str) -> None:
        """Its text goes on."""
        ...

    def on_end(self, end: int | None, tokens: tuple[int, ...]) -> None:
        """It ends: in a token, in nothing but the next header (`Special.START`), or cut (None)."""
        ...

    def on_stop(self, stop: int) -> None:
        """A stop token came, after the end of its message if one was open."""
        ...

    def on_repair(self, kind: RepairKind, detail: str) -> None:
        """Something did not fit."""
        ...


class _State(Enum):
    GAP = "between messages"
    HEADER = "in a header"
    BODY = "in a text"


class Framer:
    """Cuts a stream into messages and tells a sink; feed it token by token.

    Args:
        sink: is told of everything found.
        role: of the header that the prompt left open (`<|start|>assistant`), or None if the stream
            is a whole conversation that begins with `<|start|>`.
    """

    def __init__(self, sink: FrameSink, *, role: Role | None):
        self._sink = sink
        self._role = role
        self._state = _State.GAP if role is None else _State.HEADER
        self._header: list[int] = []
        self._tokens: list[int] = []
        self._decoder = TextDecoder()
        self._spelled = load_vocabulary().tokens

    def feed(self, token: int) -> None:
        """Take the next token; any integer is accepted."""
        if not 0 <= token < N_TEXT:
            self._control(token)
            return
        self._tokens.append(token)
        if self._state is _State.BODY:
            if text := self._decoder.feed(self._spelled[token]):
                self._sink.on_text(text)
        else:
            self._open_header_if_none()
            self._header.append(token)

    def finish(self) -> None:
        """Say that the stream is over; an open message ends as it is."""
        if self._state is _State.BODY:
            self._end_body(None)
        elif self._state is _State.HEADER:
            self._end_unfinished_header(None)

    def _control(self, token: int) -> None:
        if token in (Special.START, Special.CHANNEL) and self._state is _State.BODY:
            self._sink.on_repair(RepairKind.NO_END, "")
            self._end_body(_START)
        if token == Special.START:
            self._start()
        elif token in _ENDS:
            self._end(token)
        elif self._state is _State.BODY or token not in _HEADER_MARKS:
            self._tokens.append(token)
            self._sink.on_repair(RepairKind.STRAY_TOKEN, str(token))
        else:
            self._tokens.append(token)
            self._open_header_if_none()
            if token == Special.MESSAGE:
                self._begin_body()
            else:
                self._header.append(token)

    def _start(self) -> None:
        if self._state is _State.HEADER:
            self._end_unfinished_header(_START)
        self._tokens.append(_START)
        self._open_header(None)

    def _open_header_if_none(self) -> None:
        if self._state is _State.GAP:
            self._sink.on_repair(RepairKind.NO_START, "")
            self._open_header(Role.ASSISTANT)

    def _open_header(self, role: Role | None) -> None:
        self._role, self._header, self._state = role, [], _State.HEADER

    def _begin_body(self) -> None:
        header = read_header(self._header, role=self._role, report=self._sink.on_repair)
        self._sink.on_header(header)
        self._state = _State.BODY

    def _end(self, token: int) -> None:
        self._tokens.append(token)
        if self._state is _State.BODY:
            self._end_body(token)
        elif self._state is _State.HEADER:
            self._end_unfinished_header(token)
        else:
            kind = RepairKind.STRAY_TOKEN if token == Special.END else RepairKind.LATE_STOP
            self._sink.on_repair(kind, str(token))
        if token in STOP_TOKENS:
            self._sink.on_stop(token)

    def _end_body(self, end: int | None) -> None:
        if rest := self._decoder.finish():
            self._sink.on_text(rest)
        self._end_message(end)

    def _end_unfinished_header(self, end: int | None) -> None:
        """End a header without `<|message|>`; one with nothing in it is no message."""
        self._state = _State.GAP
        report = self._sink.on_repair
        if not self._header:
            if end is not None:
                report(RepairKind.RESTARTED_HEADER if end == _START else RepairKind.NO_MESSAGE, "")
            return
        header = read_unfinished_header(self._header, role=self._role, report=report)
        if end == _START and not header.text:
            report(RepairKind.RESTARTED_HEADER, self._header_text())
            return
        bare = self._role is not None and max(self._header) < N_TEXT
        cut = end is None and header.channel is None and not bare
        if cut or (end == Special.END and not header.text):  # nothing but a header
            report(RepairKind.NO_MESSAGE, self._header_text())
            return
        report(RepairKind.NO_MESSAGE, "")
        self._sink.on_header(header)
        if header.text:
            self._sink.on_text(header.text)
        self._end_message(end)

    def _header_text(self) -> str:
        spelled = (self._spelled[token] for token in self._header if token < N_TEXT)
        return b"".join(spelled).decode("utf-8", errors="replace").strip()

    def _end_message(self, end: int | None) -> None:
        self._state = _State.GAP
        tokens, self._tokens = tuple(self._tokens), []
        self._sink.on_end(end, tokens)


_HEADER_MARKS = frozenset((Special.CHANNEL, Special.CONSTRAIN, Special.MESSAGE))
