"""Tags per word: rows of every format, words aligned with their pieces, losses, entities scored, samples drawn."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rows import write_rows
from tagging import chunks, conlleval, first_pieces, labels_per_piece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    BertTokenizerFast,
    CTRLTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaTokenizerFast,
)

from recyclable.data.examples import model_inputs
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.tasks.parts.entities import entity_f1, has_entities, iob2
from recyclable.tasks.parts.fewshot import k_shot
from recyclable.tasks.parts.task import Task, load_task
from recyclable.tasks.tokens import CUT, NOTHING, POSITIONS, TaggedWords, Tokens
from recyclable.weights.vocabulary import load_tokenizer

pytestmark = pytest.mark.usefixtures("own_cache")
KIND = Tokens()
CONLL = """-DOCSTART- -X- -X- O

# sent_id = 1
EU NNP I-NP I-ORG
rejects VBZ I-VP O
# NN I-NP O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
"""
WORDS = [["EU", "rejects", "#"], ["Peter", "Blackburn"]]
LABELS = ("O", "I-ORG", "I-PER")
TAGS = [[1, 0, 0], [2, 2]]
NER = ("O", "B-LOC", "B-PER", "I-LOC", "I-PER")


def row(words: str, tags: str) -> dict[str, list[str]]:
    return {"tokens": words.split(), "tags": tags.split()}


GOOD = [row("EU rejects it", "B-ORG O O"), row("Peter", "B-PER")]


# ---- rows


@pytest.mark.parametrize("suffix", ["conll", "conll.gz"])
def test_conll_columns_are_sentences_with_the_last_column_as_tags(tmp_path: Path, suffix: str) -> None:
    content = CONLL.encode()
    (tmp_path / f"train.{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    task = load_task(tmp_path)
    assert (task.problem, task.labels) == ("tokens", LABELS)
    assert task.splits["train"] == Split(WORDS, None, TAGS)


def test_other_columns_go_by_their_number(tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text(CONLL)
    (tmp_path / "pos.yaml").write_text('train: train.conll\nlabel: "1"\n')
    task = load_task(tmp_path / "pos.yaml")
    assert task.labels == ("NN", "NNP", "VBZ")
    assert task.splits["train"] == Split(WORDS, None, [[1, 2, 0], [1, 1]])


def test_between_tabs_a_word_may_hold_blanks_and_be_a_number_sign(tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text("# newdoc\n#\tO\nNew York\tB-LOC \n\t\n1 000\tO\t\n")
    task = load_task(tmp_path)
    assert task.splits["train"] == Split([["#", "New York"], ["1 000"]], None, [[0, 1], [0]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("EU B-ORG\nrejects\n", "line 2: found 1 columns, expected 2 as before"),
        ("EU NNP B-ORG\n\nrejects O\n", "line 3: found 2 columns, expected 3 as before"),
        ("\n\nEU\n", "line 3: found 1 columns, expected a word and its tag"),
        ("-DOCSTART- O\n\n", "this split is empty"),
    ],
)
def test_broken_columns_are_named_by_their_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.conll").write_text(content)
    with pytest.raises(InputError, match=rf"train\.conll[,:] {message}"):
        load_task(tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_lists_in_every_format_give_the_same_task(tmp_path: Path, suffix: str) -> None:
    write_rows(tmp_path / f"train.{suffix}", GOOD)
    task = load_task(tmp_path)
    assert (task.problem, task.labels) == ("tokens", ("O", "B-ORG", "B-PER"))
    assert task.splits["train"] == Split([["EU", "rejects", "it"], ["Peter"]], None, [[1, 0, 0], [2]])


def tagged_data(*tags: list[int]) -> datasets.Dataset:
    tag = datasets.ClassLabel(names=["B-X", "O"])
    features = {"tokens": datasets.Sequence(datasets.Value("string")), "ner": datasets.Sequence(tag)}
    content = {"tokens": [["w"] * len(of) for of in tags], "ner": list(tags)}
    return datasets.Dataset.from_dict(content, features=datasets.Features(features))


def test_lists_of_class_labels_become_names_in_parquet_and_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tagged_data([1, 0], [0])
    data.to_parquet(str(tmp_path / "train.parquet"))
    hub = datasets.DatasetDict({"train": data, "test": tagged_data([1, -1])})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    sources = {"train": str(tmp_path / "train.parquet")}, {"dataset": "some/ner", "test": None}
    for source in sources:
        task = load_task({**source, "label": "ner"})
        assert (task.problem, task.labels, task.splits["train"].labels) == ("tokens", ("B-X", "O"), [[1, 0], [0]])
    with pytest.raises(InputError, match=r"some/ner, split test, row 1: column 'ner' is empty \(null\)"):
        load_task({"dataset": "some/ner", "label": "ner"})


def test_the_given_order_of_tags_is_kept_and_may_name_more_than_train_has(tmp_path: Path) -> None:
    given = ["B-PER", "B-ORG", "O", "B-LOC"]
    task = load_task({"train": str(write_rows(tmp_path / "train.jsonl", GOOD)), "labels": given})
    assert (task.labels, task.splits["train"].labels) == (tuple(given), [[1, 2, 2], [0]])


def test_texts_with_labels_may_have_their_words_beside_them(tmp_path: Path) -> None:
    rows = [{"text": "a b", "tokens": ["a", "b"], "label": label} for label in ("x", "y")]
    assert load_task({"train": str(write_rows(tmp_path / "texts.jsonl", rows))}).problem == "classification"
    rows = [{"text": "a b", **row("a b", "O B-X")}] * 2
    assert load_task({"train": str(write_rows(tmp_path / "words.jsonl", rows))}).problem == "tokens"


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (
            {"train": [*GOOD, row("a b", "O")]},
            r"train\.jsonl, row 3: 2 words and 1 tags, expected as many, at least one",
        ),
        ({"train": GOOD, "dev": [row("", "")]}, r"dev\.jsonl, row 1: 0 words and 0 tags, expected as many, at least"),
        ({"train": [row("", "")]}, r"train\.jsonl, row 1: 0 words and 0 tags"),
        (
            {"train": GOOD, "test": [row("a", "B-X")]},
            r"test\.jsonl, row 1: label 'B-X' is not in train, which has O, B",
        ),
        ({"train": [row("a b", "O O")]}, r"train\.jsonl: every label is 'O', expected at least two classes"),
        ({"train": [{"tokens": ["a"], "ner": ["O"]}]}, r"row 1: no column 'tags', found \['ner', 'tokens'\]"),
        ({"train": [{"tokens": ["a"], "tags": "O"}]}, r"row 1: column 'tags' is 'O', expected a list"),
        ({"train": [*GOOD, {"tokens": "a b", "tags": ["O"]}]}, r"row 3: column 'tokens' is 'a b', expected a list"),
        ({"train": [{"tokens": ["a", 3], "tags": ["O", "X"]}]}, r"row 1: column 'tokens' is 3, expected a string"),
        (
            {"train": [{"tokens": ["a", None], "tags": ["O", "X"]}]},
            r"row 1: column 'tokens' is empty \(null\), expected a value",
        ),
        ({"train": [*GOOD, row("a b", "O \ud800")]}, r"row 3: column 'tags' is not valid UTF-8"),
        ({"train": [*GOOD, {"tokens": ["a"], "tags": [float("nan")]}]}, r"row 3: column 'tags' is empty \(null\)"),
        (
            {"train": [{"tokens": "a b", "tags": ["O", "X"]}]},
            r"row 1: column 'tokens' is 'a b', expected a list of words",
        ),
        ({"train": [{"tokens": ["a"], "tags": [["O"]]}]}, r"row 1: column 'tags' is \['O'\], expected a string or a"),
        ({"train": [*GOOD, {"tokens": ["a"], "tags": None}]}, r"row 3: column 'tags' is empty \(null\)"),
    ],
)
def test_bad_rows_are_an_input_error(tmp_path: Path, splits: dict[str, list], message: str) -> None:
    for split, rows in splits.items():
        write_rows(tmp_path / f"{split}.jsonl", rows)
    with pytest.raises(InputError, match=message):
        load_task(tmp_path)


def test_words_in_a_cell_of_csv_are_refused_where_tokens_are_asked_for(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train.csv", [{"tokens": "a b", "tags": "O O"}])
    with pytest.raises(InputError, match=r"train\.csv, row 2: column 'tokens' is 'a b', expected a list"):
        load_task({"train": str(file), "problem": "tokens"})


@pytest.mark.parametrize("problem", [{}, {"problem": "tokens"}])
def test_a_column_of_second_texts_that_nothing_reads_is_refused(tmp_path: Path, problem: dict[str, str]) -> None:
    file = write_rows(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(InputError, match=r"task: text_pair is given, but .* only the columns of `text` and `label`"):
        load_task({"train": str(file), "text_pair": "tokens", **problem})


# ---- words and their pieces


@pytest.fixture(scope="module")
def word_pieces(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    """Words of the letters a and b; `ab` is one piece, every other letter has its own."""
    file = tmp_path_factory.mktemp("pieces") / "vocab.txt"
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "ab", "##a", "##b"]))
    return BertTokenizerFast(str(file))


def random_texts(draw: random.Random, count: int, longest: int) -> Split:
    """Words of 1 to 4 letters, some of none; tags at random."""
    texts = [
        ["".join(draw.choice("ab") for _ in range(draw.randint(0, 4))) for _ in range(draw.randint(1, longest))]
        for _ in range(count)
    ]
    return Split(texts, None, [[draw.randrange(len(NER)) for _ in words] for words in texts])


def test_a_word_is_told_from_its_first_piece_and_one_without_a_piece_is_not_asked_for(word_pieces) -> None:
    length, split = 12, random_texts(random.Random(0), 60, 12)
    examples = TaggedWords(split, word_pieces, length)
    width = max(map(len, split.texts))
    assert examples.labels.shape == (60, width) and max(examples.lengths) == length
    batch = examples.batch([(0, i) for i in range(60)])
    cut = unseen = 0
    for i, (words, tags) in enumerate(zip(split.texts, split.labels, strict=True)):
        places = first_pieces(word_pieces, words, length)
        assert batch[POSITIONS][i].tolist() == places + [0] * (width - len(words))
        wanted = [tag if place else CUT - tag for tag, place in zip(tags, places, strict=True)]
        assert batch["labels"][i].tolist() == wanted + [NOTHING] * (width - len(words))
        for word, place in zip(words, places, strict=True):
            if place:
                piece = batch["input_ids"][i, place].item()
                assert word_pieces.decode([piece]) == word_pieces.tokenize(word)[0]
            cut, unseen = cut + (not place and word != ""), unseen + (word == "")
    assert cut > 20 and unseen > 20, "the oracle has seen both"
    assert set(model_inputs(batch)) == {"input_ids", "token_type_ids", "attention_mask"}


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's folder with a byte-level BPE in the manner of RoBERTa's, without its weights."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=trained.pre_tokenizer.alphabet(), show_progress=False
    )
    trained.train_from_iterator(["the old house in berlin and the new one in paris"] * 20, trainer)
    model = json.loads(trained.to_str())["model"]
    folder = tmp_path_factory.mktemp("byte-level")
    merges = [tuple(merge) for merge in model["merges"]]
    RobertaTokenizerFast(vocab=model["vocab"], merges=merges).save_pretrained(folder)
    RobertaConfig(vocab_size=330).save_pretrained(folder)
    return folder


TEXT = ["house", "in", "Berlin", "", "the", " ", "new", "one"]


def cut(words: list[str], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids, and each word's place, as `TaggedWords` has them."""
    batch = TaggedWords(Split([words], None, [[0] * len(words)]), tokenizer, 64).batch([(0, 0)])
    return batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist(), batch[POSITIONS][0].tolist()


def test_byte_level_pieces_are_those_of_words_within_a_text(byte_level: Path) -> None:
    ids, places = cut(TEXT, load_tokenizer(byte_level))
    for plain in (
        AutoTokenizer.from_pretrained(byte_level, add_prefix_space=True),
        RobertaTokenizerFast.from_pretrained(byte_level, add_prefix_space=True),
    ):
        wanted = plain(TEXT, is_split_into_words=True)
        assert ids == wanted["input_ids"]
        assert places == [wanted.word_to_tokens(i).start if word else 0 for i, word in enumerate(TEXT)]
    words = [word for word in TEXT if word.strip()]
    assert cut(words, load_tokenizer(byte_level))[0] == plain(" " + " ".join(words))["input_ids"]
    assert cut(words, plain)[0] == cut(words, load_tokenizer(byte_level))[0], "a tokenizer that needs no help gets none"


def test_tokenizers_built_of_parts_get_the_pieces_of_words_within_a_text(byte_level: Path) -> None:
    plain = load_tokenizer(byte_level)
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    parts = [pre_tokenizers.Split(" ?[a-zA-Z]+", "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>")
    words = ["house", "in", "Berlin"]
    assert cut(words, tokenizer)[0] == tokenizer(" house in Berlin")["input_ids"]


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_sentencepieces_are_those_of_words_within_a_text(scheme: str) -> None:
    scores = {"<unk>": 0.0, "<pad>": 0.0, "▁": -5.0, "▁old": -3.0, "old": -3.0, "▁house": -3.0, "house": -3.0}
    backend = Tokenizer(models.Unigram([*scores.items()], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    ids, _ = cut(["old", "house"], tokenizer)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁old", "▁house"]


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    vocabulary.write_text(json.dumps({"<unk>": 0, "a</w>": 1, "b</w>": 2}))
    merges.write_text("#version: 0.2\n")
    slow = CTRLTokenizer(str(vocabulary), str(merges), pad_token="<unk>")
    slow.name_or_path = "here"
    with pytest.raises(InputError, match=r"here: is a slow tokenizer, .* expected one with tokenizer\.json"):
        KIND.examples(Split([["a", "b"]], None, [[0, 1]]), slow, 8)


def test_a_digest_tells_other_borders_and_other_widths_apart_but_not_other_tags(word_pieces) -> None:
    def digest(*texts: list[str], tag: int = 0) -> bytes:
        return TaggedWords(Split([*texts], None, [[tag] * len(words) for words in texts]), word_pieces, 16).digest(0)

    def ids(words: list[str]) -> list[int]:
        return word_pieces(words, is_split_into_words=True)["input_ids"]

    word_pieces.add_tokens(["(b)"])  # one piece, wherever the borders of words are
    assert ids(["a", "(b)"]) == ids(["a(b)"]) == ids(["a(b)", ""])
    found = [
        digest(["a", "(b)"]),
        digest(["a(b)"]),
        digest(["a(b)", ""]),
        digest(["", "a(b)"]),
        digest(["a(b)"], ["a"] * 3),
    ]
    assert len(set(found)) == len(found) and all(len(each) == 16 for each in found)
    assert digest(["a", "b"], tag=1) == digest(["a", "b"], tag=0)


# ---- losses


@pytest.fixture
def batch_of(word_pieces) -> Callable[[int], dict[str, torch.Tensor]]:
    examples = TaggedWords(random_texts(random.Random(1), 40, 9), word_pieces, 14)
    return lambda size: examples.batch([(0, i) for i in range(size)])


def test_loss_rows_and_count_are_those_of_transformers_labels_per_piece(batch_of) -> None:
    batch = batch_of(40)
    labels, generator = labels_per_piece(batch), torch.Generator().manual_seed(0)
    logits, other = (torch.randn(*labels.shape, len(NER), generator=generator) for _ in range(2))
    asked = labels != -100
    rows = KIND.rows(KIND.answers(logits, batch), batch)
    assert KIND.count(batch) == len(rows) == asked.sum() > 50
    assert torch.equal(rows, logits[asked]) and torch.equal(KIND.targets(batch), labels[asked])
    wanted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(KIND.loss_sum(rows, KIND.targets(batch)), wanted)
    p, q = ((each[asked] / 3).softmax(-1).double() for each in (other, logits))
    found = KIND.divergence_sum(rows, KIND.rows(KIND.answers(other, batch), batch), 3.0)
    torch.testing.assert_close(found.double(), (p * (p / q).log()).sum(), rtol=1e-4, atol=1e-5)


def test_labels_per_piece_that_others_make_are_read_as_they_are(batch_of) -> None:
    batch = batch_of(5)
    theirs = {**model_inputs(batch), "labels": labels_per_piece(batch)}
    logits = torch.randn(*theirs["labels"].shape, len(NER))
    rows = [KIND.rows(KIND.answers(logits, of), of) for of in (batch, theirs)]
    assert torch.equal(*rows) and KIND.count(theirs) == KIND.count(batch)
    unlabelled = model_inputs(batch)
    assert len(KIND.rows(KIND.answers(logits, unlabelled), unlabelled)) == batch["attention_mask"].sum()


def test_a_batch_without_a_word_that_is_seen_has_no_loss(word_pieces) -> None:
    batch = TaggedWords(Split([["", " "]], None, [[0, 1]]), word_pieces, 8).batch([(0, 0)])
    logits = torch.randn(1, batch["input_ids"].shape[1], len(NER), requires_grad=True)
    loss = KIND.loss_sum(KIND.rows(KIND.answers(logits, batch), batch), KIND.targets(batch))
    loss.backward()
    assert (KIND.count(batch), loss.item(), logits.grad.abs().sum().item()) == (0, 0, 0)


def test_features_are_the_states_of_first_pieces_and_of_them_a_linear_model_makes_predictions(batch_of) -> None:
    batch = batch_of(12)
    states = torch.randn(*batch["input_ids"].shape, 6)
    targets = batch["labels"].numpy()
    asked = KIND.asked(targets)
    assert asked.sum() == KIND.count(batch)
    assert torch.equal(KIND.features(states, batch)[torch.from_numpy(asked)], states[labels_per_piece(batch) != -100])
    encoded = KIND.encoded(targets[asked])
    assert (encoded.argmax(1) == np.unique(targets[asked], return_inverse=True)[1]).all()
    predictions = np.zeros((*targets.shape, len(NER) + 1))  # a tag that does not occur is never predicted
    predictions[asked] = KIND.decoded(encoded, targets[asked], len(NER) + 1)
    assert (predictions[asked].argmax(-1) == targets[asked]).all()


# ---- scores


SCHEMES = {"IOB1": "IB", "IOB2": "BI", "IOBES": "BIES", "BILOU": "BILU", "mixed": "BIELSU"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_entities_of_any_sequence_of_tags_are_those_of_conlleval(scheme: str) -> None:
    draw = random.Random(scheme)
    tags = ["O", "O", *(f"{prefix}-{of}" for prefix in SCHEMES[scheme] for of in ("PER", "LOC"))]
    best = 0.0
    for _ in range(300):
        wanted = [[draw.choice(tags) for _ in range(draw.randint(1, 12))] for _ in range(draw.randint(1, 4))]
        found = [[tag if draw.random() < 0.7 else draw.choice(tags) for tag in of] for of in wanted]
        assert entity_f1(wanted, found) == pytest.approx(conlleval(wanted, found))
        best = max(best, entity_f1(wanted, found)["f1"])
    assert best > 0.8


def test_the_same_entities_in_other_schemes_are_the_same() -> None:
    same = {
        "IOB1": "I-PER I-PER B-PER O I-LOC I-ORG",
        "IOB2": "B-PER I-PER B-PER O B-LOC B-ORG",
        "IOBES": "B-PER E-PER S-PER O S-LOC S-ORG",
        "BILOU": "B-PER L-PER U-PER O U-LOC U-ORG",
    }
    for one in same.values():
        assert iob2(one.split()) == same["IOB2"].split()
        assert chunks(one.split()) == {(0, 2, "PER"), (2, 3, "PER"), (4, 5, "LOC"), (5, 6, "ORG")}
        for other in same.values():
            assert entity_f1([one.split()], [other.split()]) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}
    assert entity_f1([["O", "O"]], [["O", "O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize(
    ("labels", "entities"),
    [(NER, True), (("O", "S-PER"), True), (("O", "B"), False), (("B-PER", "I-PER"), False), (("O", "NOUN"), False)],
)
def test_tags_of_entities_are_known_by_their_form_and_select_by_entity_f1(labels: tuple, entities: bool) -> None:
    assert has_entities(labels) == entities
    assert KIND.metrics(labels) == (("f1", "accuracy") if entities else ("accuracy", "f1_macro"))


def logits_for(tags: list[list[int]], width: int, classes: int) -> np.ndarray:
    """[N, width, classes], highest at these tags; at random beyond them."""
    logits = np.random.default_rng(0).normal(size=(len(tags), width, classes))
    for i, of in enumerate(tags):
        logits[i, range(len(of)), of] += 10
    return logits


def targets_of(tags: list[list[int]], width: int, unseen: Iterable[tuple[int, int]] = ()) -> np.ndarray:
    targets = np.full((len(tags), width), NOTHING)
    for i, of in enumerate(tags):
        targets[i, : len(of)] = of
    for place in unseen:
        targets[place] = CUT - targets[place]
    return targets


TRUE, TOLD = [[2, 4, 0, 1, 3], [2, 0, 0]], [[2, 4, 0, 1, 0], [1, 2, 0]]


def test_scores_are_of_entities_and_of_words() -> None:
    found = KIND.score(logits_for(TOLD, 6, 5), targets_of(TRUE, 6), NER)
    names = [[[NER[i] for i in of] for of in side] for side in (TRUE, TOLD)]
    assert found == pytest.approx({**conlleval(*names), "accuracy": 5 / 8, "f1_macro": found["f1_macro"]})
    assert found["f1"] == pytest.approx(2 * (1 / 4) * (1 / 3) / (1 / 4 + 1 / 3))
    # tags O, B-LOC, B-PER, I-LOC (told of nothing), I-PER: hits over told and true
    assert found["f1_macro"] == pytest.approx(np.mean([2 * 2 / 6, 2 * 1 / 3, 2 * 1 / 4, 0, 2 * 1 / 2]))


def test_words_that_no_model_sees_count_as_told_to_be_nothing() -> None:
    unseen = [(0, 3), (0, 4), (1, 2)]
    right = KIND.score(logits_for(TRUE, 6, 5), targets_of(TRUE, 6, unseen), NER)
    told = [["B-PER", "I-PER", "O", "O", "O"], ["B-PER", "O", "O"]]
    wanted = [[NER[i] for i in of] for of in TRUE]
    assert right == pytest.approx({**conlleval(wanted, told), "accuracy": 6 / 8, "f1_macro": right["f1_macro"]})
    assert right["recall"] == pytest.approx(2 / 3) and right["precision"] == 1.0


def test_words_that_no_model_sees_are_wrong_where_no_tag_says_nothing() -> None:
    tags = [[0, 1, 1, 0]]
    found = KIND.score(logits_for(tags, 4, 2), targets_of(tags, 4, [(0, 3)]), ("NOUN", "VERB"))
    assert found == pytest.approx({"accuracy": 3 / 4, "f1_macro": np.mean([2 * 1 / 3, 1])})


def test_words_with_a_nan_are_wrong_and_no_entity() -> None:
    logits = logits_for(TRUE, 6, 5)
    logits[0, 2:4, 3] = np.nan  # an O and a B-LOC
    found = KIND.score(logits, targets_of(TRUE, 6), NER)
    told = [["B-PER", "I-PER", "O", "O", "I-LOC"], ["B-PER", "O", "O"]]
    wanted = [[NER[i] for i in of] for of in TRUE]
    assert found == pytest.approx({**conlleval(wanted, told), "accuracy": 6 / 8, "f1_macro": found["f1_macro"]})
    broken = KIND.score(np.full((2, 6, 5), np.nan), targets_of(TRUE, 6), NER)
    assert broken == dict.fromkeys(("precision", "recall", "f1", "accuracy", "f1_macro"), 0.0)


def test_the_mean_loss_is_over_words_that_are_seen() -> None:
    logits, targets = logits_for(TOLD, 6, 5), targets_of(TRUE, 6, [(0, 0)])
    seen = torch.from_numpy(targets)
    wanted = F.cross_entropy(torch.from_numpy(logits).flatten(0, 1), seen.where(seen >= 0, -100).flatten())
    assert KIND.mean_loss(logits, targets) == pytest.approx(wanted.item(), rel=1e-5)


def test_who_knows_nothing_tells_the_frequency_of_tags() -> None:
    split = Split([["a", "b", "c"], ["d"]], None, [[0, 0, 2], [0]])
    assert np.exp(KIND.ignorance(split, NER)) == pytest.approx(np.array([4, 1, 2, 1, 1]) / 9)


# ---- samples


def test_few_shots_hold_texts_with_every_tag() -> None:
    draw = random.Random(3)
    common = [[0] * draw.randint(1, 5) for _ in range(200)]
    rare = [[0, 0, 1], [0, 1], [1, 0], [0, 2, 1], [2]]
    split = Split([["w"] * len(tags) for tags in common + rare], None, common + rare)
    strata = KIND.strata(split)
    assert strata == [0] * 200 + [1, 1, 1, 2, 2]
    few, short = k_shot(split, 3, 0, strata)
    assert sorted(min(tags, key=lambda tag: -tag) for tags in few.labels) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert {KIND.stratum_name(stratum, NER): count for stratum, count in short.items()} == {"B-PER": 2}


def test_two_tasks_differ_by_where_words_begin(tmp_path: Path) -> None:
    def task(*rows: dict[str, Any]) -> Task:
        return load_task({"train": str(write_rows(tmp_path / "train.jsonl", [*rows]))})

    one = task(row("a b", "O B-X"))
    assert one.digest == task(row("a b", "O B-X")).digest
    assert one.digest not in (task(row("ab c", "O B-X")).digest, task(row("a b", "B-X O")).digest)
