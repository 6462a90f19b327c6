"""The token ledger: a stand-in cache whose state is the tokens it was fed proves every start."""

import random

import pytest

from mlx_gptoss.harmony import (
    Channel,
    DeveloperContent,
    HarmonyParser,
    Message,
    MessageDone,
    OldAnalysis,
    RenderOptions,
    SystemContent,
    ToolDescription,
    developer,
    function_tools,
    render_conversation_for_completion,
    render_message,
    system,
    tool_result,
    user,
)
from mlx_gptoss.harmony.ledger import (
    PrefixStore,
    Prompt,
    Start,
    TokenLedger,
    common_prefix,
    prepare_prompt,
)
from mlx_gptoss.vocabulary import load_vocabulary

TOOLS = {"functions.look": "look"}
HEAD = [
    system(SystemContent(date="2026-01-01")),
    developer(
        DeveloperContent(
            instructions="Look things up.",
            tools=(function_tools(ToolDescription(name="look", parameters={"type": "object"})),),
        )
    ),
]
REASONING = "<|channel|>analysis<|message|>Thinking about {}.<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>I look at {}.<|end|><|start|>assistant"
# As the models write it, which is not as a call is rendered: the recipient stands elsewhere.
CALL = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{{"at":{}}}<|call|>'
ANSWER = "<|channel|>final<|message|>It is {}, surely.<|return|>"


def sampled(text: str) -> tuple[list[int], list[Message]]:
    """A turn as sampled: its tokens, and the messages it parses to."""
    tokens = load_vocabulary().encoding.encode(text, allowed_special="all")
    parser = HarmonyParser(TOOLS)
    events = [event for token in tokens for event in parser.feed(token)]
    return tokens, [event.message for event in events if isinstance(event, MessageDone)]


class StandInCache:
    """Counts what is computed, and checks that what it holds is what it should hold."""

    def __init__(self) -> None:
        self.ledger: TokenLedger[tuple[int, ...]] = TokenLedger()
        self.fed: list[int] = []

    def prefill(self, prompt: Prompt) -> int:
        """Bring the cache to a prompt, save where it is stable, return the tokens computed."""
        start = self.ledger.best_start(prompt.tokens)
        if start.state is not None:
            self.fed = list(start.state)
        elif start.length == 0:
            self.fed = []
        self.ledger.rewind(start)
        assert tuple(self.fed) == prompt.tokens[: start.length]
        if start.length < prompt.stable:
            self.feed(prompt.tokens[start.length : prompt.stable])
            self.ledger.save(tuple(self.fed))
        self.feed(prompt.tokens[len(self.fed) :])
        assert tuple(self.fed) == prompt.tokens
        return len(prompt.tokens) - start.length

    def feed(self, tokens: tuple[int, ...] | list[int]) -> None:
        self.fed += tokens
        self.ledger.feed(tokens)
        assert self.ledger.tokens == self.fed


def size(*messages: Message) -> int:
    return sum(len(render_message(message)) for message in messages)


def test_twenty_turns_with_tools_compute_what_is_new_and_what_the_drop_moved() -> None:
    """The count is predicted from the rule alone, message by message."""
    cache, messages, header = StandInCache(), list(HEAD), 2
    turn: list[Message] = []
    for number in range(20):
        question = user(f"Question {number}?")
        messages.append(question)
        if number == 0:
            expected = len(prepare_prompt(messages).tokens)
        else:  # everything of the turn before but its reasoning, which is gone
            expected = size(*(m for m in turn if m.channel != Channel.ANALYSIS), question) + header
        turn = []
        for call in range(number % 4):
            assert cache.prefill(prepare_prompt(messages)) == expected
            parts = REASONING + (PREAMBLE if call % 2 else "") + CALL
            tokens, new = sampled(parts.format(*[10 * number + call] * parts.count("{}")))
            cache.feed(tokens[:-1])
            result = tool_result("functions.look", f"Seen {call}")
            expected = 1 + size(result) + header  # the unfed <|call|>, and what is new
            turn += [*new, result]
            messages += [*new, result]
        assert cache.prefill(prepare_prompt(messages)) == expected
        tokens, new = sampled((REASONING + ANSWER).format(number, number))
        cache.feed(tokens[:-1])
        turn += new
        messages += new


def test_without_dropping_only_new_tokens_are_computed() -> None:
    keep = RenderOptions(old_analysis=OldAnalysis.KEEP)
    cache, messages = StandInCache(), list(HEAD)
    for number in range(5):
        question = user(f"Question {number}?")
        messages.append(question)
        computed = cache.prefill(prepare_prompt(messages, options=keep))
        assert number == 0 or computed == 1 + size(question) + 2
        tokens, new = sampled((REASONING + ANSWER).format(number, number))
        cache.feed(tokens[:-1])
        messages += new


def test_asking_again_computes_the_header_only() -> None:
    """Regenerating an answer, or changing the last question, goes back to the saved position."""
    cache, messages = StandInCache(), [*HEAD, user("Why?")]
    cache.prefill(prepare_prompt(messages))
    cache.feed(sampled(REASONING.format(1) + ANSWER.format(1))[0][:-1])
    assert cache.prefill(prepare_prompt(messages)) == 2
    other = [*HEAD, user("Why not?")]
    assert cache.prefill(prepare_prompt(other)) == len(prepare_prompt(other).tokens)


def conversations(seed: int) -> list[list[Message]]:
    """A random conversation at each moment when the model is to write."""
    rng, messages, moments = random.Random(seed), list(HEAD[: seed % 3]), []
    for number in range(rng.randrange(2, 7)):
        messages.append(user(f"Question {number}?"))
        for _ in range(rng.randrange(3)):
            moments.append(list(messages))
            text = rng.choice(["", REASONING]) + rng.choice(["", PREAMBLE]) + CALL
            messages += sampled(text.format(*[number] * text.count("{}")))[1]
            messages.append(tool_result("functions.look", "Seen"))
        moments.append(list(messages))
        if rng.random() < 0.8:  # else the turn was cancelled
            text = rng.choice(["", REASONING]) + ANSWER
            messages += sampled(text.format(*[number] * text.count("{}")))[1]
    return moments


@pytest.mark.parametrize("keep", list(OldAnalysis))
def test_later_prompts_begin_with_the_stable_part(keep: OldAnalysis) -> None:
    options = RenderOptions(old_analysis=keep)
    for seed in range(60):
        prompts = [prepare_prompt(moment, options=options) for moment in conversations(seed)]
        for number, prompt in enumerate(prompts):
            for later in prompts[number:]:
                assert later.tokens[: prompt.stable] == prompt.tokens[: prompt.stable], seed


def test_prompt_is_the_rendered_one_and_its_ends_are_the_messages() -> None:
    for moment in conversations(7):
        prompt = prepare_prompt(moment)
        assert list(prompt.tokens) == render_conversation_for_completion(moment)
        assert prompt.ends[-1] == len(prompt.tokens) - 2
        assert prompt.stable in (0, *prompt.ends)


def test_every_start_is_right_and_the_best_one() -> None:
    """Random feeding, saving and going back, over an alphabet small enough to repeat itself."""
    rng, cache = random.Random(3), StandInCache()
    for _ in range(3000):
        prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
        start = cache.ledger.best_start(prompt)
        common = common_prefix(cache.fed, prompt)
        saved = [p for p in cache.ledger.positions if p <= min(common, len(prompt) - 1)]
        whole = common == len(cache.fed) < len(prompt)
        assert start.length == (common if whole else max(saved, default=0))
        stable = rng.randrange(len(prompt) + 1)
        cache.prefill(Prompt(tokens=tuple(prompt), ends=(), stable=stable))
        if rng.random() < 0.5:
            cache.feed([rng.randrange(2)])
        if cache.ledger.positions and rng.random() < 0.2:
            position = rng.choice(cache.ledger.positions)
            assert len(cache.ledger.forget(position)) == position


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt: expected at least one token, got none"):
        TokenLedger[int]().best_start([])


def test_store_finds_the_longest_start_and_stays_within_its_budget() -> None:
    """Against a plain list searched from its newest end."""
    rng, store = random.Random(4), PrefixStore[tuple[int, ...]](100)
    used: list[tuple[tuple[int, ...], int]] = []  # the last one was used last
    for _ in range(4000):
        tokens = tuple(rng.randrange(2) for _ in range(rng.randrange(9)))
        if rng.random() < 0.5:
            size_bytes = rng.randrange(1, 120)
            assert store.put(tokens, tokens, size_bytes=size_bytes) == (size_bytes <= 100)
            used = [entry for entry in used if entry[0] != tokens]
            if size_bytes <= 100:
                used.append((tokens, size_bytes))
                while sum(size for _, size in used) > 100:
                    used.pop(0)
        else:
            fits = [e for e in used if len(e[0]) < len(tokens) and tokens[: len(e[0])] == e[0]]
            best = max(fits, key=lambda entry: len(entry[0]), default=None)
            assert store.best_start(tokens) == (
                Start(len(best[0]), best[0]) if best else Start(0, None)
            )
            if best:
                used.remove(best)
                used.append(best)
        assert store.used_bytes == sum(size for _, size in used) <= 100
        assert len(store) == len(used)
    store.clear()
    assert (len(store), store.used_bytes) == (0, 0)


def test_a_shared_system_prompt_serves_another_conversation() -> None:
    store = PrefixStore[str](1000)
    head = prepare_prompt(HEAD)
    store.put(head.tokens[: head.stable], "head", size_bytes=10)
    other = prepare_prompt([*HEAD, user("Something else")])
    assert store.best_start(other.tokens) == Start(head.stable, "head")
    assert store.best_start(prepare_prompt([user("No head")]).tokens) == Start(0, None)


def test_common_prefix() -> None:
    rng = random.Random(6)
    for _ in range(500):
        one, two = ([rng.randrange(2) for _ in range(rng.randrange(40))] for _ in range(2))
        two = one[: rng.randrange(len(one) + 1)] + two
        slow = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), None)  # noqa: B905
        assert common_prefix(one, two) == (min(len(one), len(two)) if slow is None else slow)
