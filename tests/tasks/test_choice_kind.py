"""Choice: answers as files spell them, options in tokens, and accuracies against a plain model asked one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from families import config as tiny
from families import drawn
from rows import write_rows
from spoken import byte_level, sentence_pieces, with_end
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PreTrainedModel, T5Config

from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.objectives.token_loss import TokenLoss
from recyclable.tasks import KINDS
from recyclable.tasks.choice import Choice
from recyclable.tasks.parts.options import LENGTHS, ROWS, Options
from recyclable.tasks.parts.task import load_task
from recyclable.training.asking import Asked

pytestmark = pytest.mark.usefixtures("own_cache")
KIND = Choice()
TEXTS = ["What is 2 + 2? Answer:", "The capital of France is ", "Hello there, how are"]
OPTIONS = [[" 4", " yes no perhaps", " 2"], ["Paris", "France"], [" you?", " you", " Hello", " the capital of France"]]
RIGHT = [0, 1, 3]


def rows(answers: list[Any], choices: Any = None, **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": "p", "choices": choices or ["x", "y", "z"], "answer": answer, **more} for answer in answers]


def answers_of(folder: Path, made: list[dict[str, Any]], suffix: str = "jsonl", **spec: Any) -> list[int]:
    return load_task({"train": str(write_rows(folder / f"train.{suffix}", made)), **spec}).splits["train"].labels


def options(tokenizer: Any, max_length: int | None = None) -> Options:
    return KIND.examples(Split(TEXTS, OPTIONS, RIGHT, "f", None), tokenizer, max_length)


def decoder(tokenizer: Any, **changed: Any) -> PreTrainedModel:
    return drawn(tiny("llama", vocab_size=len(tokenizer), **{"eos_token_id": 2, **changed}), AutoModelForCausalLM)


# ---- rows


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "parquet"])
@pytest.mark.parametrize("column", ["prompt", "question"])
def test_prompts_or_questions_with_choices_in_every_format(suffix: str, column: str, tmp_path: Path) -> None:
    made = [{column: t, "choices": o, "answer": r, "id": 1} for t, o, r in zip(TEXTS, OPTIONS, RIGHT, strict=True)]
    write_rows(tmp_path / f"train.{suffix}", made)
    task = load_task(tmp_path)
    assert (task.problem, task.labels) == ("choice", ())
    assert task.splits["train"] == Split(TEXTS, OPTIONS, RIGHT)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_options_as_on_the_hub_bring_their_labels(suffix: str, tmp_path: Path) -> None:
    choices = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
    write_rows(tmp_path / f"train.{suffix}", rows(["A", "C", "B"], choices))
    task = load_task(tmp_path)
    assert task.splits["train"] == Split(["p"] * 3, [["x", "y", "z"]] * 3, [0, 2, 1])


@pytest.mark.parametrize(
    ("answers", "choices", "wanted"),
    [
        ([0, 2, 1], None, [0, 2, 1]),
        ([0.0, 2.0], None, [0, 2]),
        (["z", "x"], None, [2, 0]),
        (["1", "2"], None, [1, 2]),  # an index, spelt, as no option has that text
        (["1", "2"], ["2", "1", "0"], [1, 0]),  # the very text of an option
        ([1, 2], ["2", "1", "0"], [1, 2]),  # a number is an index
        (["A", "z", 1], {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, [0, 2, 1]),
        (["1", "4", 4], {"text": ["w", "x", "y", "z"], "label": ["1", "2", "3", "4"]}, [0, 3, 3]),
        (["B"], {"text": ["B", "A"], "label": ["A", "B"]}, [1]),
        ([1], ["x", "x"], [1]),
    ],
)
def test_an_answer_is_a_label_or_the_very_text_or_an_index(
    answers: list, choices: Any, wanted: list, tmp_path: Path
) -> None:
    for answer, index in zip(answers, wanted, strict=True):
        assert answers_of(tmp_path, rows([answer], choices)) == [index]


def test_letters_that_a_file_declares_are_labels_whatever_the_options_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = datasets.Value("string")
    features = datasets.Features(
        {"question": text, "choices": datasets.List(text), "answer": datasets.ClassLabel(names=["A", "B", "C"])}
    )
    content = {"question": ["p", "p"], "choices": [["C", "x", "y"], ["x", "y"]], "answer": [2, 1]}
    data = datasets.Dataset.from_dict(content, features=features)
    data.to_parquet(str(tmp_path / "train.parquet"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict({"train": data}))
    for source in (tmp_path, {"dataset": "some/mmlu"}):
        assert load_task(source).splits["train"].labels == [2, 1]


def test_a_task_file_names_the_columns(tmp_path: Path) -> None:
    made = [{"ctx": "p", "endings": ["x", "y"], "label": "1"}]
    assert answers_of(tmp_path, made, prompt="ctx", choices="endings", answer="label") == [1]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (rows([3]), "row 1: answer 3, expected the very text of an option, or an index from 0 to 2"),
        (rows([0, -1]), "row 2: answer -1, expected the very text"),
        (rows([0, 0.5]), "row 2: answer 0.5, expected"),
        (rows([True]), "row 1: answer True, expected the very text of an option, or an index"),
        (rows(["w"]), "row 1: answer 'w', expected the very text"),
        (rows(["B"]), "row 1: answer 'B', expected the very text"),
        (
            rows(["D"], {"text": ["x", "y"], "label": ["A", "B"]}),
            "row 1: answer 'D', expected a label of A, B, the very",
        ),
        (rows(["x"], ["x", "y", "x"]), "row 1: answer 'x' is the text of several options, expected an index"),
        (rows([None]), r"row 1: column 'answer' is empty \(null\)"),
        (rows([0], ["x"]), "row 1: column 'choices' is .* expected at least two options, none of them empty"),
        (rows([0], ["x", ""]), "row 1: column 'choices' is .* expected at least two options, none of them empty"),
        (rows([0], "x, y"), "row 1: column 'choices' is 'x, y', expected a list of texts, or"),
        (rows([0], ["x", None]), r"row 1: column 'choices' is empty \(null\)"),
        (rows([0], ["x", 3]), "row 1: column 'choices' is 3, expected a string"),
        (rows([0], {"text": ["x", "y"], "label": ["A"]}), "row 1: .* expected a label for each option, all different"),
        (rows([0], {"text": ["x", "y"], "label": ["A", "A"]}), "row 1: .* expected a label for each option, all diff"),
        (rows([0], {"text": ["x", "y"]}), "row 1: column 'choices' is .* expected a list of texts, or"),
        ([{"prompt": "p", "choices": ["x", "y"]}], r"row 1: no column 'answer', found \['choices', 'prompt'\]"),
    ],
)
def test_bad_rows_are_an_input_error(made: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as caught:
        answers_of(tmp_path, made)
    assert "\n" not in str(caught.value)


def test_the_digest_follows_prompts_options_and_answers(tmp_path: Path) -> None:
    others = [rows([0]), rows([1]), rows([0], ["x", "z", "y"]), rows([0], prompt="q")]
    digests = [load_task({"train": str(write_rows(tmp_path / "train.jsonl", made))}).digest for made in others]
    assert len(set(digests)) == 4


def test_what_it_reads_is_explained() -> None:
    told = {setting["name"]: setting["default"] for setting in KINDS.get("choice").explained()}
    assert told == {"prompt": "prompt or question", "choices": "choices", "answer": "answer"}


# ---- tokens


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_options_follow_their_prompts_without_an_end_and_blanks_are_theirs(make: Any) -> None:
    tokenizer = make()
    for text, of, group in zip(TEXTS, OPTIONS, options(tokenizer).options, strict=True):
        for option, row in zip(of, group, strict=True):
            assert row.ids == tokenizer(text + option)["input_ids"]
            assert row.ids[: row.told[0]] == tokenizer(text.rstrip())["input_ids"]
            assert list(row.told) == list(range(row.told[0], len(row.ids)))


def test_the_right_option_alone_is_trained_on() -> None:
    tokenizer = byte_level()
    examples = options(tokenizer)
    batch = examples.batch([(0, 0), (0, 1), (0, 2)])
    assert ROWS not in batch and len(batch["input_ids"]) == 3
    assert tokenizer.decode(batch["targets"]) == " 4" + " France" + " the capital of France"
    assert examples.labels.tolist() == RIGHT and len({examples.digest(i) for i in range(3)}) == 3


def test_all_options_are_asked_about() -> None:
    tokenizer = byte_level()
    asked = options(tokenizer).asked
    batch = asked.batch([(0, 1), (0, 2)])
    assert batch[ROWS].tolist() == [[0, 1, -1, -1], [2, 3, 4, 5]]
    assert batch[LENGTHS].tolist() == [[5, 6, 1, 1], [5, 4, 6, 22]]
    assert len(asked) == 3 and asked.batch([(0, 0)])[ROWS].tolist() == [[0, 1, 2, -1]]
    assert [
        tokenizer.decode(ids[mask == 1]) for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ] == [text + option for text, of in list(zip(TEXTS, OPTIONS, strict=True))[1:] for option in of]
    alone = [asked.batch([(0, index)])["attention_mask"].sum(1) for index in range(3)]
    assert asked.lengths.tolist() == [int(real.max()) for real in alone] and len({*asked.lengths}) > 1


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(begin=True)], ids=["bare", "begin"])
def test_a_prompt_loses_its_beginning_where_max_length_is_short(tokenizer: Any) -> None:
    whole, cut = options(tokenizer), options(tokenizer, 8)
    begin = tokenizer("")["input_ids"]
    lost = 0
    for long, short in zip(whole.options, cut.options, strict=True):
        longest = max(len(row.told) for row in long)
        for a, b in zip(long, short, strict=True):
            prompt, answer = a.ids[: a.told[0]], b.targets
            assert answer == a.targets and len(b.ids) <= 8
            kept = b.ids[: b.told[0]]
            assert kept == (
                prompt if len(prompt) + longest <= 8 else begin + prompt[len(begin) + len(prompt) - 8 + longest :]
            )
        lost += len(short[0].ids) < len(long[0].ids)
    assert cut.remark == f"{lost} of 3 prompts lose their beginning at max_length 8" and whole.remark is None


def test_an_option_that_is_longer_than_max_length_is_cut_too() -> None:
    tokenizer = byte_level()
    cut = options(tokenizer, 2)
    assert [[len(row.ids) for row in group] for group in cut.options] == [[2, 2, 2], [2, 2], [2, 2, 2, 2]]
    assert all(list(row.told) == [1] for group in cut.options for row in group)
    short = sum(len(row.told) > 1 for group in options(tokenizer).options for row in group)
    assert cut.remark == f"3 of 3 prompts lose their beginning at max_length 2, {short} of 9 options their end"


def test_an_option_without_tokens_is_refused() -> None:
    tokenizer = with_end()
    with pytest.raises(InputError, match="makes no token of the option ' '"):
        _ = KIND.examples(Split(["yes"], [["no", " "]], [0]), tokenizer, None).options


def test_tokens_of_wrong_options_must_be_readable_as_well() -> None:
    tokenizer = byte_level()
    highest = max(max(row.ids) for row in options(tokenizer).rows)
    config = LlamaConfig(vocab_size=highest + 1)
    config.name_or_path = "base"
    assert max(max(row.ids) for row in options(tokenizer).read_rows) > highest
    with pytest.raises(InputError, match="expected lower ids"):
        options(tokenizer).readable_by(config)


# ---- scores


def naive(model: PreTrainedModel, examples: Options) -> list[list[float]]:
    """Summed log-likelihoods of options, one at a time."""
    found: list[list[float]] = []
    for group in examples.options:
        found.append([])
        for row in group:
            if row.source is None:
                logits = model(torch.tensor([row.ids])).logits[0, row.told[0] - 1 : -1]
            else:
                logits = model(torch.tensor([row.source]), decoder_input_ids=torch.tensor([row.ids[:-1]])).logits[0]
            found[-1].append(float(F.log_softmax(logits, -1).gather(1, torch.tensor(row.targets)[:, None]).sum()))
    return found


def check(model: PreTrainedModel, examples: Options) -> None:
    ask = Asked(TokenLoss(model, answers=KIND.answers), 2)
    with torch.no_grad():
        wanted = naive(model, examples)
    told = ask.predict(examples)
    assert told.shape == (3, 4, 2)
    for row, (likely, of) in enumerate(zip(wanted, OPTIONS, strict=True)):
        np.testing.assert_allclose(told[row, : len(of), 0], likely, rtol=1e-4)
        assert told[row, : len(of), 1].tolist() == [len(option) for option in of]
        assert (told[row, len(of) :] == [-np.inf, 1]).all()
    plain = [int(np.argmax(likely)) for likely in wanted]
    normed = [
        int(np.argmax([x / len(o) for x, o in zip(*pair, strict=True)])) for pair in zip(wanted, OPTIONS, strict=True)
    ]
    scores = KIND.scores(ask, examples, ())
    for name, found in (("accuracy", plain), ("accuracy_norm", normed)):
        assert scores[name] == pytest.approx(sum(a == b for a, b in zip(found, RIGHT, strict=True)) / 3)
    among = [F.log_softmax(torch.tensor(likely), -1)[right] for likely, right in zip(wanted, RIGHT, strict=True)]
    assert KIND.mean_loss(told, examples.labels.numpy()) == pytest.approx(-float(sum(among)) / 3, rel=1e-4)


@pytest.mark.parametrize("max_length", [None, 8])
def test_accuracies_of_a_decoder_are_those_of_options_asked_one_by_one(max_length: int | None) -> None:
    tokenizer = byte_level()
    model = decoder(tokenizer)
    check(model, options(tokenizer, max_length).readable_by(model.config))


def test_accuracies_of_an_encoder_decoder_are_too() -> None:
    tokenizer = with_end()
    size = {"d_model": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1, "d_ff": 16}
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **size)
    examples = options(tokenizer).readable_by(config)
    assert examples.rows[0].source == tokenizer(TEXTS[0])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(examples.rows[1].ids) == ["<pad>", "France"]
    check(drawn(config, AutoModelForSeq2SeqLM), examples)


def test_the_longest_prompts_of_an_encoder_lose_their_beginning_too() -> None:
    tokenizer = with_end()
    config = T5Config(vocab_size=len(tokenizer), decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    for whole, cut in zip(*(options(tokenizer, most).readable_by(config).rows for most in (None, 4)), strict=True):
        assert cut.source == whole.source[-4:] and len(whole.source) > 4 and cut.ids == whole.ids[: len(cut.ids)]


def test_scores_of_worked_examples() -> None:
    told = np.array([[[-3, 1], [-4, 4]], [[-2, 1], [-1, 1]], [[np.nan, 1], [-1, 1]], [[-np.inf, 1], [-9, 2]]])
    assert KIND.score(told, np.array([0, 1, 1, 1]), ()) == {"accuracy": 3 / 4, "accuracy_norm": 2 / 4}
