"""Conversations by chat templates: which tokens an assistant says, as templates tell that mark them, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import spoken
from spoken import byte_level, sentence_pieces
from transformers import LlamaConfig, PreTrainedTokenizerFast

from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks.parts.chat import last_turn, written
from recyclable.tasks.parts.responses import Responses

Conversation = list[dict[str, Any]]


def said(*turns: str) -> Conversation:
    """ "user: hello" ..."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


ONE = said("user: What is 2 + 2?", "assistant: It is 4.")
TWO = [*ONE, *said("user: Hello", "assistant: Hello there")]
SYSTEM = [*said("system: You are a helpful assistant."), *TWO]
TOOL = [*said("user: Hello", "assistant: Question", "tool: 4"), *said("assistant: It is 4.")]
MARKED = {"chatml": spoken.CHATML, "default system": spoken.DEFAULT_SYSTEM, "headers": spoken.HEADERS}


def examples(conversations: list[Conversation], tokenizer: PreTrainedTokenizerFast, **more: Any) -> Responses:
    """As a decoder reads them whose generation stops at the tokenizer's end token."""
    answers = [one[-1]["content"] for one in conversations]
    config = LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    split = Split(conversations, None, answers, "chat.jsonl", None)
    return Responses(split, tokenizer, more.get("max_length")).readable_by(config)


@pytest.mark.parametrize("template", MARKED.values(), ids=list(MARKED))
@pytest.mark.parametrize("conversation", [ONE, TWO, SYSTEM, TOOL], ids=["one", "two", "system", "tool"])
def test_told_are_the_tokens_that_a_template_with_marks_marks(template: str, conversation: Conversation) -> None:
    tokenizer = byte_level(template)
    found = tokenizer.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [place for place, mark in enumerate(found["assistant_masks"]) if mark]
    (row,) = examples([conversation], tokenizer).rows
    assert row.told == marked and marked
    assert row.ids == found["input_ids"][: len(row.ids)]
    rest = tokenizer.decode(found["input_ids"][len(row.ids) :])
    assert rest == ("" if template == spoken.HEADERS else "\n")  # what follows the end of the last turn


def test_every_turn_is_told_and_the_last_one_is_generated_from_all_before_it() -> None:
    tokenizer = byte_level(spoken.CHATML)
    made = examples([SYSTEM], tokenizer)
    assert tokenizer.decode(made.rows[0].targets) == "It is 4.<|im_end|>Hello there<|im_end|>"
    (prompt,) = made.prompts
    assert prompt == tokenizer.apply_chat_template(SYSTEM[:-1], add_generation_prompt=True)["input_ids"]
    assert made.references == ["Hello there"]


def test_pieces_with_a_blank_before_the_first_word_are_those_of_the_whole_conversation() -> None:
    tokenizer = sentence_pieces(spoken.BRACKETS)
    made = examples([TWO], tokenizer)
    whole = tokenizer.apply_chat_template(TWO)["input_ids"]
    assert made.rows[0].ids == whole
    assert tokenizer.decode(made.rows[0].targets) == "It is 4.</s> Hello there</s>"
    assert whole.count(tokenizer.bos_token_id) == 1


def test_where_a_token_reaches_over_the_seam_answers_go_on_from_what_generation_starts_from() -> None:
    tokenizer = byte_level(spoken.CHATML)
    tokenizer.backend_tokenizer.add_tokens(["\nIt"])
    made = examples([ONE], tokenizer)
    (prompt,) = made.prompts
    assert prompt == tokenizer.apply_chat_template(ONE[:-1], add_generation_prompt=True)["input_ids"]
    assert made.rows[0].ids[: len(prompt)] == prompt
    assert tokenizer.decode(made.rows[0].targets) == "It is 4.<|im_end|>"
    assert tokenizer.apply_chat_template(ONE)["input_ids"][: len(prompt)] != prompt


def test_the_last_turn_is_the_last_message_of_an_assistant() -> None:
    assert last_turn(said("user: a", "assistant: b", "user: c")) == 1
    assert last_turn(said("user: a")) is None


def test_what_a_template_adds_to_an_answer_is_part_of_it() -> None:
    tokenizer = byte_level(spoken.FORGETFUL)
    made = examples([ONE], tokenizer)
    assert tokenizer.decode(made.rows[0].targets) == "<think>\n\n</think>\n\nIt is 4.<|im_end|>"
    assert made.references == ["<think>\n\n</think>\n\nIt is 4."]


@pytest.mark.parametrize(
    ("template", "conversation", "message"),
    [
        (
            spoken.FORGETFUL,
            TWO,
            "chat.jsonl, row 2: .* earlier assistant turns otherwise .*'.*think.* became '",
        ),
        (spoken.SLY, ONE, r"row 2: .* does not begin message 2, an assistant's, as it begins an answer: .*think"),
        (spoken.BRACKETS, SYSTEM, "row 2: .* cannot write it: Only user and assistant roles are supported!"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", ONE, "row 2: .* cannot write it: can only concat"),
        ("{% for m in messages %}", ONE, "row 2: .* cannot write it: Unexpected end of template"),
        (spoken.CHATML, ONE[1:], "row 2: begins with the assistant's message, expected one before it"),
        (None, ONE, "has no chat template, which `messages` need"),
    ],
)
def test_a_template_that_cannot_tell_turns_apart_is_refused_with_the_row(
    template: str | None, conversation: Conversation, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        written(byte_level(template), [conversation], ["chat.jsonl, row 2"])
    assert "\n" not in str(caught.value)
