"""Generation: how rows are read, which tokens are learnt, what max_length cuts, and scores against plain loops."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import spoken
import torch
from families import config as tiny
from families import drawn
from rows import write_rows
from spoken import byte_level, sentence_pieces, with_end
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    T5Config,
)

from recyclable.data.decoding import Decoding
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.objectives.token_loss import TokenLoss
from recyclable.tasks import KINDS
from recyclable.tasks.generation import Generation
from recyclable.tasks.parts.fewshot import k_shot
from recyclable.tasks.parts.responses import Responses
from recyclable.tasks.parts.task import Task, load_task
from recyclable.training.asking import Asked

pytestmark = pytest.mark.usefixtures("own_cache")
KIND = Generation()
PAIRS = [
    {"prompt": "The capital of France is", "response": " Paris."},
    {"prompt": "Answer: ", "response": "yes"},
    {"prompt": "What is 2 + 2?", "response": " It is 4."},
]
CHATS = [
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there"}]},
    {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "It is 4."},
            {"role": "user", "content": "yes?"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "Hello"},
        ]
    },
]


def task_of(folder: Path, rows: list[dict[str, Any]], **spec: Any) -> Task:
    return load_task({"train": str(write_rows(folder / "train.jsonl", rows)), **spec})


def decoder(tokenizer: Any, folder: Path | None = None, **changed: Any) -> PretrainedConfig:
    """A config that stops at the tokenizer's end token."""
    told = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, **changed}
    made = LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16, **told)
    made.name_or_path = str(folder or "")
    return made


def encoder_decoder(tokenizer: Any) -> PretrainedConfig:
    size = {"d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "d_ff": 16, "initializer_factor": 3.0}
    return T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **size)


def paired(tokenizer: Any, max_length: int | None = None, rows: list[dict[str, str]] = PAIRS) -> Responses:
    split = Split([row["prompt"] for row in rows], None, [row["response"] for row in rows], "f", None)
    return KIND.examples(split, tokenizer, max_length)


# ---- rows


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv.gz", "parquet"])
def test_prompts_and_responses_in_every_format_give_the_same_task(suffix: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"train.{suffix}", PAIRS)
    write_rows(tmp_path / f"dev.{suffix}", PAIRS[:1])
    task = load_task(tmp_path)
    assert (task.problem, task.labels, set(task.splits)) == ("generation", (), {"train", "dev"})
    prompts, responses = ([row[key] for row in PAIRS] for key in ("prompt", "response"))
    assert task.splits["train"] == Split(prompts, None, responses)
    assert json.loads(json.dumps(task.described()))["problem"] == "generation"


@pytest.mark.parametrize("suffix", ["jsonl", "json.gz", "parquet"])
def test_conversations_end_with_their_last_assistant_turn(suffix: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"train.{suffix}", CHATS)
    split = load_task(tmp_path).splits["train"]
    assert split == Split([CHATS[0]["messages"], CHATS[1]["messages"][:-1]], None, ["Hello there", "yes"])
    assert split.place(1).endswith(f"train.{suffix}, row {split.places[1]}")


def test_the_hub_and_a_task_file_may_name_the_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"chat": CHATS[0]["messages"], "text": "x"}])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    assert load_task({"dataset": "some/chat", "messages": "chat"}).splits["train"].labels == ["Hello there"]
    (tmp_path / "task.yaml").write_text("train: qa.csv\nprompt: q\nresponse: a\nmax_new_tokens: 7\n")
    write_rows(tmp_path / "qa.csv", [{"q": "Hello", "a": "yes"}])
    task = load_task(tmp_path)
    assert (task.problem, task.splits["train"].texts, task.settings.max_new_tokens) == ("generation", ["Hello"], 7)
    assert task_of(tmp_path, [{"messages": "x", **PAIRS[0]}]).splits["train"].texts == [PAIRS[0]["prompt"]]
    both = [{**PAIRS[0], **CHATS[0]}]
    assert task_of(tmp_path, both).splits["train"].texts == [PAIRS[0]["prompt"]]
    assert task_of(tmp_path, both, messages="messages").splits["train"].labels == ["Hello there"]


def test_columns_of_these_names_may_still_be_of_a_classification(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": "y"}]
    assert task_of(tmp_path, rows, text="prompt", label="response").labels == ("x", "y")
    assert task_of(tmp_path, rows, text="prompt", label="response", problem="classification").labels == ("x", "y")
    with pytest.raises(InputError, match=r"row 1: no column 'lable', found \['prompt', 'response'\]"):
        task_of(tmp_path, rows, text="prompt", label="lable")


def test_messages_keep_what_templates_read_and_lose_what_parquet_fills_in(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    messages = [{"role": "user", "content": "a", "name": "Ann"}, call, {"role": "tool", "content": "b"}, call]
    write_rows(tmp_path / "train.parquet", [{"messages": messages}])
    (found,) = load_task(tmp_path).splits["train"].texts
    assert found == messages
    assert load_task(tmp_path).splits["train"].labels == [""]


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        (
            [{"prompt": "a"}],
            {"problem": "generation"},
            r"row 1: no column 'response', found \['prompt'\]; name it in task.y",
        ),
        ([{"prompt": "a", "reply": "b"}], {}, r"row 1: no column 'response', found \['prompt', 'reply'\]"),
        ([*PAIRS, {"prompt": "a", "response": None}], {}, r"row 4: column 'response' is empty \(null\)"),
        ([*PAIRS, {"prompt": 3, "response": "b"}], {}, "row 4: column 'prompt' is 3, expected a string"),
        (
            [{"messages": []}],
            {},
            r"row 1: column 'messages' is \[\], expected a list of messages, each {role: ..., cont",
        ),
        ([{"messages": "hi"}], {}, "row 1: column 'messages' is 'hi', expected a list of messages"),
        ([{"messages": ["hi"]}], {}, r"row 1: column 'messages' is \['hi'\], expected a list of messages"),
        ([{"messages": [{"content": "a"}]}], {}, "row 1: column 'messages' is .* expected a list of messages"),
        (
            [{"messages": [{"role": "user", "content": 3}]}],
            {},
            "row 1: column 'messages.content' is 3, expected a string",
        ),
        ([{"messages": [{"role": "user"}]}], {}, "row 1: column 'messages.content' is None, expected a string"),
        ([{"messages": [{"role": 1, "content": "a"}]}], {}, "row 1: column 'messages.role' is 1, expected a string"),
        ([*CHATS, {"messages": CHATS[0]["messages"][:1]}], {}, "row 3: no message is the assistant's, expected one at"),
        (PAIRS, {"labels": ["a", "b"]}, "labels are for classes, but problem is generation"),
        (PAIRS, {"label": "response"}, "label is given, but this kind of task reads only the columns of `prompt` and"),
        (CHATS, {"response": "x"}, "response is given, but this kind of task reads only the columns of `messages`"),
        (PAIRS, {"max_new_tokens": 0}, "max_new_tokens"),
        (PAIRS, {"max_new_tokens": "many"}, "max_new_tokens"),
        (PAIRS, {"top_p": 0.9}, "top_p is given, but nothing reads it without do_sample"),
        (PAIRS, {"do_sample": True, "temperature": 0}, "temperature"),
        (
            [{"text": "a", "label": x} for x in "ab"],
            {"max_new_tokens": 3},
            "max_new_tokens is given, but nothing reads it",
        ),
    ],
)
def test_bad_rows_and_keys_are_an_input_error(rows: list, spec: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        task_of(tmp_path, rows, **spec)
    assert "\n" not in str(caught.value)


def test_the_digest_follows_what_is_asked_and_said(tmp_path: Path) -> None:
    other = [{**PAIRS[0], "response": " Lyon."}, *PAIRS[1:]]
    digests = [task_of(tmp_path, rows).digest for rows in (PAIRS, other, CHATS, CHATS[:1])]
    assert len(set(digests)) == 4
    assert task_of(tmp_path, PAIRS, max_new_tokens=3).digest == digests[0]


def test_few_shots_are_of_all_examples_alike(tmp_path: Path) -> None:
    split = task_of(tmp_path, PAIRS).splits["train"]
    few, short = k_shot(split, 2, 0, KIND.strata(split))
    assert (len(few), short, KIND.stratum_name(0, ())) == (2, {}, "")
    assert [few.places, few.file] == [[split.places[split.texts.index(text)] for text in few.texts], split.file]


def test_what_it_reads_is_explained() -> None:
    told = {setting["name"]: setting for setting in KINDS.get("generation").explained()}
    drawn = ["do_sample", "temperature", "top_p", "top_k", "seed"]
    assert list(told) == ["prompt", "response", "messages", "max_new_tokens", *drawn]
    assert told["max_new_tokens"]["type"] == "int | None" and "256" in told["max_new_tokens"]["about"]


# ---- tokens


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_only_the_response_and_an_end_token_are_told(make: Any) -> None:
    tokenizer = make()
    examples = paired(tokenizer).readable_by(decoder(tokenizer))
    for row, pair, prompt in zip(examples.rows, PAIRS, examples.prompts, strict=True):
        assert row.ids[: row.told[0]] == prompt == tokenizer(pair["prompt"])["input_ids"]
        assert list(row.told) == list(range(len(prompt), len(row.ids)))
        assert row.targets[-1] == tokenizer.eos_token_id and row.ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(row.ids, skip_special_tokens=True) == pair["prompt"] + pair["response"]
    assert examples.references == [pair["response"] for pair in PAIRS]


def test_an_end_token_that_a_response_brings_is_not_doubled() -> None:
    tokenizer = byte_level()
    (row,) = paired(tokenizer, rows=[{"prompt": "Hello", "response": " there<|im_end|>"}]).rows
    assert row.targets.count(tokenizer.eos_token_id) == 1


def test_an_empty_response_is_an_end_token() -> None:
    tokenizer = byte_level()
    (row,) = paired(tokenizer, rows=[{"prompt": "Hello", "response": ""}]).rows
    assert row.targets == [tokenizer.eos_token_id]


def test_no_pad_token_is_needed() -> None:
    tokenizer = byte_level()
    assert tokenizer.pad_token_id is None
    batch = paired(tokenizer).readable_by(decoder(tokenizer)).batch([(0, 0), (0, 1)])
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()


@pytest.mark.parametrize("most", range(2, 14))
def test_a_response_is_cut_at_max_length_and_told_how_often(most: int) -> None:
    tokenizer = byte_level()
    whole, cut = (paired(tokenizer, length).readable_by(decoder(tokenizer)) for length in (None, most))
    lost = wholly = 0
    for long, short in zip(whole.rows, cut.rows, strict=True):
        assert short.ids == long.ids[:most]
        assert short.targets == [token for at, token in enumerate(long.ids) if at in long.told and at < most]
        lost += len(short.targets) < len(long.targets)
        wholly += not short.targets
    told = f"{lost} of 3 responses are cut at max_length {most}, {wholly} of them wholly"
    assert cut.remark == (told if lost else None) and whole.remark is None
    assert cut.prompts == whole.prompts and cut.references == whole.references
    assert cut.labels.tolist() == [len(row.targets) for row in cut.rows]
    assert cut.max_new_tokens == whole.max_new_tokens == max(len(row.targets) for row in whole.rows)


def test_where_nothing_or_no_end_is_left_to_learn_the_task_is_refused() -> None:
    tokenizer = byte_level()
    with pytest.raises(
        InputError, match="max_length: is 2, which leaves no token of any response in train to learn fr"
    ):
        paired(tokenizer, 2).readable_by(decoder(tokenizer)).require_learnable()
    shortest = min(len(row.ids) for row in paired(tokenizer).rows)
    with pytest.raises(InputError, match=rf"max_length: is {shortest - 1}, which cuts the end off every response"):
        paired(tokenizer, shortest - 1).readable_by(decoder(tokenizer)).require_learnable()
    KIND.require_learnable(paired(tokenizer, shortest).readable_by(decoder(tokenizer)))


def test_an_end_token_is_needed() -> None:
    tokenizer = byte_level(end=None)
    with pytest.raises(InputError, match=r"has no end token .* which follows a response so that generation stops"):
        paired(tokenizer).readable_by(decoder(tokenizer, eos_token_id=1))


def chats(tokenizer: Any) -> Responses:
    split = Split([row["messages"][:2] for row in CHATS[:1]], None, ["Hello there"], "f", None)
    return KIND.examples(split, tokenizer, None)


def test_a_template_must_end_turns_where_generation_stops(tmp_path: Path) -> None:
    tokenizer = byte_level(spoken.CHATML, end="<|other|>")
    config = decoder(tokenizer, tmp_path)
    unstopped = chats(tokenizer).readable_by(config)
    message = rf"{tmp_path}: generation stops at '<\|other\|>', but no response in train has that: .* with '\\n'"
    with pytest.raises(InputError, match=message):
        unstopped.require_learnable()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, end]}))
    stopped = chats(tokenizer).readable_by(config)
    stopped.require_learnable()
    assert tokenizer.decode(stopped.rows[0].targets) == "Hello there<|im_end|>"
    assert tokenizer.decode(unstopped.rows[0].targets) == "Hello there<|im_end|>\n"


def test_tokens_that_the_base_has_no_row_for_and_too_long_texts_are_refused() -> None:
    tokenizer = byte_level()
    with pytest.raises(InputError, match="has vocab_size 300: expected lower ids"):
        paired(tokenizer).readable_by(decoder(tokenizer, vocab_size=300))
    with pytest.raises(InputError, match="has positions for 4: expected a max_length"):
        paired(tokenizer).readable_by(decoder(tokenizer, max_position_embeddings=4))
    assert len(paired(tokenizer, 4).readable_by(decoder(tokenizer, max_position_embeddings=4))) == 3


def test_an_encoder_reads_prompts_and_a_decoder_tells_responses() -> None:
    tokenizer = with_end()
    examples = paired(tokenizer, 5).readable_by(encoder_decoder(tokenizer))
    for row, pair, prompt in zip(examples.rows, PAIRS, examples.prompts, strict=True):
        source = tokenizer(pair["prompt"], truncation=True, max_length=5)["input_ids"]
        assert row.source == prompt == source and row.ids[0] == 0
        assert row.targets == tokenizer(text_target=pair["response"])["input_ids"][:5]
    conversation = byte_level(spoken.CHATML)
    (row,) = chats(conversation).readable_by(encoder_decoder(conversation)).rows
    assert conversation.decode(row.source) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert conversation.decode(row.targets) == "Hello there<|im_end|>"
    several = KIND.examples(Split([CHATS[1]["messages"][:5]], None, ["yes"], "f", [7]), conversation, None)
    with pytest.raises(
        InputError, match="f, row 7: has 2 assistant turns, expected one: an encoder-decoder answers once"
    ):
        several.readable_by(encoder_decoder(conversation))


def test_the_same_tokens_are_the_same_example_to_a_teacher() -> None:
    tokenizer = byte_level()
    examples = paired(tokenizer, rows=[*PAIRS, PAIRS[0]])
    assert examples.digest(0) == examples.digest(3) != examples.digest(1)


# ---- how long answers may be


def test_answers_may_be_as_long_as_the_longest_of_train_or_as_the_task_file_says(tmp_path: Path) -> None:
    tokenizer = byte_level()
    task = load_task(
        {
            "train": str(write_rows(tmp_path / "train.jsonl", PAIRS)),
            "test": str(write_rows(tmp_path / "test.jsonl", [{"prompt": "Hello", "response": " you" * 300}])),
        }
    )
    longest = max(len(tokenizer(pair["response"])["input_ids"]) for pair in PAIRS) + 1
    for split in task.splits.values():
        assert KIND.examples_of(task, split, tokenizer, 4).readable_by(decoder(tokenizer)).max_new_tokens == longest
    assert KIND.examples(task.splits["test"], tokenizer, None).max_new_tokens == 256
    told = task_of(tmp_path, PAIRS, max_new_tokens=3)
    assert KIND.examples_of(told, told.splits["train"], tokenizer, None).max_new_tokens == 3


def test_where_positions_are_too_few_for_prompt_and_answer_the_prompt_loses_its_beginning() -> None:
    tokenizer = byte_level(begin=True)
    whole = paired(tokenizer, 8).readable_by(decoder(tokenizer))
    new = whole.max_new_tokens
    short = paired(tokenizer, 8).readable_by(decoder(tokenizer, max_position_embeddings=8))
    assert short.max_new_tokens == new < 8
    for long, cut in zip(whole.prompts, short.prompts, strict=True):
        assert cut == (long if len(long) <= 8 - new else [0, *long[1 + len(long) - 8 + new :]])
    assert {len(cut) for cut in short.prompts} == {8 - new}
    split = Split(["Hello"], None, [" there" * 30], "f", None)
    few = Responses(split, tokenizer, 8).readable_by(decoder(tokenizer, max_position_embeddings=8))
    assert (few.max_new_tokens, len(few.prompts[0])) == (7, 1)
    with pytest.raises(InputError, match=r"max_new_tokens: is 8, but .*has positions for 8 tokens"):
        Responses(split, tokenizer, 8, 8).readable_by(decoder(tokenizer, max_position_embeddings=8))


# ---- scores


class Parrot:
    """Says what it was told to say, and remembers what it was asked."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers, self.asked = answers, []

    def predict(self, examples: Responses) -> np.ndarray:
        return np.array([[-1.0, 2], [-3.0, 1], [-2.0, 3]])

    def generate(self, prompts: list[list[int]], decoding: Decoding, rules: GenerationConfig) -> list[list[int]]:
        self.asked.append((prompts, decoding, rules.eos_token_id))
        return self.answers


def test_log_likelihood_is_a_mean_over_tokens_and_needs_no_generating() -> None:
    tokenizer = byte_level()
    examples, ask = paired(tokenizer), Parrot([])
    found = KIND.scores(ask, examples, (), ["log_likelihood"])
    assert found == {"log_likelihood": -1.0, "perplexity": pytest.approx(math.e)} and not ask.asked
    assert KIND.metrics(())[0] == "log_likelihood"
    assert KIND.mean_loss(ask.predict(examples), examples.labels.numpy()) == 1.0


@pytest.mark.parametrize("wanted", [None, ["exact_match"], ["log_likelihood", "rouge_l"]])
def test_generated_answers_are_compared_as_texts(wanted: list[str] | None) -> None:
    tokenizer = byte_level()
    examples = paired(tokenizer)
    said = [tokenizer(text)["input_ids"] for text in (" Paris.", " yes\n", " It is 5.")]
    ask = Parrot(said)
    found = KIND.scores(ask, examples, (), wanted)
    assert ask.asked == [(examples.prompts, Decoding(examples.max_new_tokens), [tokenizer.eos_token_id])]
    assert found["exact_match"] == pytest.approx(2 / 3)
    assert [found["f1"], found["rouge_l"]] == pytest.approx([(1 + 1 + 2 / 3) / 3] * 2)
    assert set(found) == {"log_likelihood", "perplexity", "exact_match", "f1", "rouge_l"}


def test_a_task_file_may_have_answers_drawn(tmp_path: Path) -> None:
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "seed": 3}
    task, ask = task_of(tmp_path, PAIRS, max_new_tokens=4, **drawn), Parrot([[3]] * len(PAIRS))
    examples = KIND.examples_of(task, task.splits["train"], byte_level(), None)
    KIND.scores(ask, examples, ())
    assert [decoding for _, decoding, _ in ask.asked] == [Decoding(4, top_k=0, **drawn)]


def test_rows_without_anything_to_tell_are_generated_from_but_add_nothing_to_the_likelihood() -> None:
    nothing = np.array([[0.0, 0], [-4.0, 2]])
    assert KIND.score(nothing, np.array([0, 2]), ()) == {"log_likelihood": -2.0, "perplexity": pytest.approx(math.e**2)}
    assert math.isnan(KIND.score(nothing[:1], np.array([0]), ())["log_likelihood"])


def naive_decoder(model: Any, rows: list) -> float:
    """Mean log-likelihood per told token, a row at a time."""
    told = []
    for row in rows:
        logits = model(torch.tensor([row.ids])).logits[0]
        told += [float(F.log_softmax(logits[at - 1], -1)[row.ids[at]]) for at in row.told]
    return sum(told) / len(told)


def naive_encoder_decoder(model: Any, rows: list) -> float:
    told = []
    for row in rows:
        if row.targets:
            logits = model(torch.tensor([row.source]), decoder_input_ids=torch.tensor([row.ids[:-1]])).logits[0]
            told += F.log_softmax(logits, -1).gather(1, torch.tensor(row.targets)[:, None]).flatten().tolist()
    return sum(told) / len(told)


@pytest.mark.parametrize("max_length", [None, 7])
def test_the_likelihood_is_that_of_a_plain_model_asked_one_by_one(max_length: int | None) -> None:
    tokenizer = byte_level()
    model = drawn(tiny("llama", vocab_size=len(tokenizer), eos_token_id=2), AutoModelForCausalLM)
    examples = paired(tokenizer, max_length).readable_by(model.config)
    found = KIND.scores(Asked(TokenLoss(model, answers=KIND.answers), 2), examples, (), ["log_likelihood"])
    with torch.no_grad():
        assert found["log_likelihood"] == pytest.approx(naive_decoder(model, examples.rows), rel=1e-5)


@pytest.mark.parametrize("max_length", [None, 3])
def test_the_likelihood_of_an_encoder_decoder_is_too(max_length: int | None) -> None:
    tokenizer = with_end()
    model = drawn(encoder_decoder(tokenizer), AutoModelForSeq2SeqLM)
    examples = paired(tokenizer, max_length).readable_by(model.config)
    found = KIND.scores(Asked(TokenLoss(model, answers=KIND.answers), 2), examples, (), ["log_likelihood"])
    with torch.no_grad():
        assert found["log_likelihood"] == pytest.approx(naive_encoder_decoder(model, examples.rows), rel=1e-5)
