"""Rendering: what the documents say, rule by rule; `test_harmony_differential` does the rest."""

import openai_harmony as upstream
import pytest
from harmony_oracle import oracle

from mlx_gptoss.harmony import (
    DeveloperContent,
    Message,
    ReasoningEffort,
    Role,
    SystemContent,
    developer,
    render_conversation_for_completion,
    render_message,
    system,
    user,
)
from mlx_gptoss.vocabulary import load_vocabulary


def text_of(tokens: list[int]) -> str:
    return load_vocabulary().decode(tokens)


@pytest.mark.parametrize("effort", list(ReasoningEffort))
def test_prompt_of_a_first_turn(effort: ReasoningEffort) -> None:
    prompt = render_conversation_for_completion(
        [
            system(SystemContent(effort=effort, date="2025-06-28")),
            developer(DeveloperContent(instructions="Be brief.")),
            user("What is 2 + 2?"),
        ]
    )
    assert text_of(prompt) == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\n"
        "Current date: 2025-06-28\n"
        "\n"
        f"Reasoning: {effort}\n"
        "\n"
        "# Valid channels: analysis, commentary, final. "
        "Channel must be included for every message.<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant"
    )
    theirs = upstream.Conversation.from_messages(
        [
            upstream.Message.from_role_and_content(
                upstream.Role.SYSTEM,
                upstream.SystemContent.new()
                .with_reasoning_effort(upstream.ReasoningEffort[effort.upper()])
                .with_conversation_start_date("2025-06-28"),
            ),
            upstream.Message.from_role_and_content(
                upstream.Role.DEVELOPER,
                upstream.DeveloperContent.new().with_instructions("Be brief."),
            ),
            upstream.Message.from_role_and_content(upstream.Role.USER, "What is 2 + 2?"),
        ]
    )
    assert prompt == oracle().render_conversation_for_completion(theirs, upstream.Role.ASSISTANT)
    assert all(type(token) is int for token in prompt)


def test_sampled_tokens_are_history_as_they_are_but_for_the_end() -> None:
    sampled = (200006, 173781, 200005, 17196, 200008, 42, 43, 200002)
    message = Message(Role.ASSISTANT, "KL", channel="final", sampled=sampled)
    assert render_message(message) == [*sampled[:-1], 200007]
