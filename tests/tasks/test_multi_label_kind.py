"""Several labels per text: how rows are read, and losses and scores that are those of plain PyTorch and of sets."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from rows import write_rows
from torch.distributions import Bernoulli, kl_divergence
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification
from worlds import make_tokenizer

from recyclable.data.examples import LabelledTexts, model_inputs
from recyclable.data.split import Split
from recyclable.errors import InputError
from recyclable.objectives.labelled import LabelledTask
from recyclable.tasks import KINDS, every_kind
from recyclable.tasks.multi_label import MultiLabel
from recyclable.tasks.parts.fewshot import k_shot
from recyclable.tasks.parts.task import load_task

pytestmark = pytest.mark.usefixtures("own_cache")
KIND = MultiLabel()
LABELS = ("anger", "fear", "joy")
SETS: list[list[Any]] = [["joy", "fear"], [], ["anger"], ["fear", "anger", "joy"]]
HOT = [[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1]]


def rows(cells: list[Any], **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"w{i}", "label": cell, **more} for i, cell in enumerate(cells)]


def task_of(folder: Path, cells: list[Any], **spec: Any) -> Any:
    path = write_rows(folder / "train.jsonl", rows(cells))
    return load_task({"train": str(path), **spec})


# ---- rows


@pytest.mark.parametrize("suffix", ["jsonl", "json", "jsonl.gz", "parquet"])
def test_lists_of_names_in_every_format_give_the_same_task(suffix: str, tmp_path: Path) -> None:
    write_rows(tmp_path / f"train.{suffix}", rows(SETS))
    write_rows(tmp_path / f"dev.{suffix}", rows([["joy"], []]))
    task = load_task(tmp_path)
    assert (task.problem, task.labels, task.ordered) == ("multi_label", LABELS, False)
    assert task.splits["train"] == Split(["w0", "w1", "w2", "w3"], None, HOT)
    assert task.splits["dev"].labels == [[0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("cells", [HOT, np.array(HOT, float).tolist(), np.array(HOT, bool).tolist()])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_zeros_and_ones_are_an_answer_for_each_label(cells: list, suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"train.{suffix}", rows(cells))
    task = load_task(path.parent)
    assert (task.problem, task.labels, task.ordered) == ("multi_label", ("0", "1", "2"), True)
    named = load_task({"train": str(path), "labels": LABELS[::-1]})
    assert named.labels == LABELS[::-1] and named.splits["train"].labels == task.splits["train"].labels == HOT


def test_texts_may_come_in_pairs(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", rows(SETS, text_pair="p"))
    assert load_task(tmp_path).splits["train"] == Split(["w0", "w1", "w2", "w3"], ["p"] * 4, HOT)


def test_texts_may_have_their_words_beside_them_where_no_tags_are(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", rows(SETS, tokens=["w", "v"]))
    assert load_task(tmp_path).splits["train"] == Split(["w0", "w1", "w2", "w3"], None, HOT)
    tagged = [{**row, "tags": ["O", tag]} for row, tag in zip(rows(SETS, tokens=["w", "v"]), "ABAB", strict=True)]
    write_rows(tmp_path / "train.jsonl", tagged)
    assert load_task(tmp_path).problem == "tokens"


def test_declared_labels_keep_their_order(tmp_path: Path) -> None:
    names, ids = ["joy", "anger", "fear"], [[0, 2], [], [1], [2, 1, 0]]
    label = datasets.List(datasets.ClassLabel(names=names))
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    data = datasets.Dataset.from_dict({"text": ["t"] * 4, "label": ids}, features=features)
    data.to_parquet(str(tmp_path / "train.parquet"))
    task = load_task(tmp_path)
    assert (task.problem, task.labels, task.ordered) == ("multi_label", tuple(names), True)
    assert task.splits["train"].labels == [[int(i in of) for i in range(3)] for of in ids]


def test_a_task_file_gives_the_order_and_may_name_more_than_train_has(tmp_path: Path) -> None:
    task = task_of(tmp_path, SETS, labels=["joy", "none", "fear", "anger"])
    assert task.splits["train"].labels == [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 1, 1]]


def test_whole_numbers_in_lists_of_any_length_are_names(tmp_path: Path) -> None:
    task = task_of(tmp_path, [[0, 2], [1], [10]])
    assert (task.labels, task.splits["train"].labels[0]) == (("0", "1", "2", "10"), [1, 0, 1, 0])


def test_a_task_in_another_order_has_the_same_labels(tmp_path: Path) -> None:
    order = ["joy", "anger", "fear"]
    task = task_of(tmp_path, SETS).in_order(order)
    assert [{task.labels[i] for i, has in enumerate(hot) if has} for hot in task.splits["train"].labels] == [
        set(of) for of in SETS
    ]
    assert task.digest == task_of(tmp_path, SETS, labels=order).digest


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": [["a"], "b"]}, r"train\.jsonl, row 2: column 'label' is 'b', expected a list of labels"),
        ({"train": [["a"], None]}, r"train\.jsonl, row 2: column 'label' is empty \(null\)"),
        ({"train": [["a"], ["b", None]]}, r"train\.jsonl, row 2: column 'label' is empty \(null\)"),
        ({"train": [["a"], [["b"]]]}, r"train\.jsonl, row 2: column 'label' is \['b'\], expected a string or a number"),
        ({"train": [["a"], ["a"]]}, r"train\.jsonl: every label is 'a', expected at least two"),
        ({"train": [[], []]}, r"train\.jsonl: there is no label, expected at least two"),
        (
            {"train": [["a", "b"], ["b", "b"]]},
            r"train\.jsonl, row 2: label 'b' twice in \['b', 'b'\], expected differe",
        ),
        ({"train": [[0, 1, 0], [1, 0]]}, r"train\.jsonl, row 1: label '0' twice in \[0, 1, 0\], expected different na"),
        ({"train": [[0.2, 0.8], [1, 0]]}, r"train\.jsonl, row 1: label 0\.2, expected different names, or in eve"),
        ({"train": [["a"], ["b"]], "dev": [["c"]]}, r"dev\.jsonl, row 1: label 'c' is not in train, which has a, b"),
        ({"train": HOT, "dev": [[0, 1]]}, r"dev\.jsonl, row 1: labels \[0, 1\], expected 3 numbers, each 0 or 1"),
        ({"train": HOT, "dev": [[0, 1, 2]]}, r"dev\.jsonl, row 1: labels \[0, 1, 2\], expected 3 numbers, each 0 or"),
        ({"train": HOT, "dev": [["a"]]}, r"dev\.jsonl, row 1: labels \['a'\], expected 3 numbers"),
    ],
)
def test_bad_rows_are_an_input_error(splits: dict[str, list], message: str, tmp_path: Path) -> None:
    for split, cells in splits.items():
        write_rows(tmp_path / f"{split}.jsonl", rows(cells))
    with pytest.raises(InputError, match=message):
        load_task(tmp_path)


def test_rows_are_of_the_kind_that_the_task_names(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 1: column 'label' is \['joy', 'fear'\], expected a string or a number"):
        task_of(tmp_path, SETS, problem="classification")
    with pytest.raises(InputError, match=r"row 1: column 'label' is 'a', expected a list of labels"):
        task_of(tmp_path, ["a", "b"], problem="multi_label")
    with pytest.raises(InputError, match=r"row 1: label '1' twice in \[0, 1, 1\], .* a 0 or 1 for each label there is"):
        task_of(tmp_path, HOT, labels=["a", "b"])


# ---- losses


def model_of(kind: str, count: int = 3, **config: Any) -> BertForSequenceClassification:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    made = BertConfig(vocab_size=200, **sizes, initializer_range=0.5, **config)
    KINDS.get(kind)().set_labels(made, [f"l{i}" for i in range(count)])
    return BertForSequenceClassification(made).eval()


def test_the_loss_is_that_of_transformers() -> None:
    texts = [" ".join(f"w{random.Random(i).randrange(90)}" for _ in range(i + 2)) for i in range(8)]
    hot = [[int(random.Random(9 * i + j).random() < 0.4) for j in range(3)] for i in range(8)]
    examples = LabelledTexts(Split(texts, None, hot), make_tokenizer(), 16)
    batch = examples.batch([(0, i) for i in range(8)])
    assert batch["labels"].shape == (8, 3)
    model = model_of("multi_label")
    objective = LabelledTask(model, KIND)
    wanted = model(**model_inputs(batch), labels=batch["labels"].float()).loss.detach()
    loss = objective.sums(batch)["task"] / objective.counts(batch)["task"]
    torch.testing.assert_close(loss, wanted)
    predictions = objective.predict(batch).detach().numpy()
    assert KIND.mean_loss(predictions, examples.labels.numpy()) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_divergence_is_the_sum_of_those_of_bernoulli_distributions(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher = 5 * torch.randn(4, 3), 5 * torch.randn(4, 3)
    batch = {"labels": torch.zeros(4, 3)}
    found = KIND.divergence_sum(KIND.rows(student, batch), KIND.rows(teacher, batch), temperature)
    p, q = (Bernoulli(logits=logits.double() / temperature) for logits in (teacher, student))
    torch.testing.assert_close(found.double(), kl_divergence(p, q).sum(), rtol=1e-5, atol=1e-6)
    assert KIND.count(batch) == len(KIND.rows(student, batch)) == len(KIND.targets(batch)) == 12
    assert float(KIND.divergence_sum(KIND.rows(teacher, batch), KIND.rows(teacher, batch), temperature)) == 0


@pytest.mark.parametrize("earlier", ["regression", "multi_label_classification", "single_label_classification", None])
def test_every_kind_says_of_what_type_its_problem_is_whatever_the_base_was_for(earlier: str | None) -> None:
    types = {"classification": "single_label_classification", "regression": "regression", "tokens": None}
    types["multi_label"] = "multi_label_classification"
    types |= dict.fromkeys(("generation", "choice"), earlier)  # a language-model head has no problem
    for kind in every_kind():
        config = BertConfig(problem_type=earlier)
        kind.set_labels(config, ["a", "b"] if kind.has_labels else [])
        assert config.problem_type == types[kind.name]


def test_transformers_then_trains_a_head_by_the_loss_of_the_kind() -> None:
    ids = torch.tensor([[2, 7, 3]])
    single = model_of("classification", problem_type="multi_label_classification")
    assert single(ids, labels=torch.tensor([1])).loss > 0
    several = model_of("multi_label", problem_type="single_label_classification")
    assert several(ids, labels=torch.tensor([[1.0, 0.0, 1.0]])).loss > 0
    tags = BertForTokenClassification(model_of("tokens", problem_type="regression").config)
    assert tags(ids, labels=torch.tensor([[0, 1, 2]])).loss > 0


# ---- scores


def by_sets(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """From sets of labels, a text at a time."""
    found = [{c for c, logit in enumerate(row) if logit > 0} for row in predictions]
    wanted = [{c for c, has in enumerate(row) if has} for row in targets]
    pairs = list(zip(found, wanted, strict=True))

    def f1(of: list[tuple[set[int], set[int]]]) -> float:
        hits, told, true = (sum(map(len, each)) for each in ([a & b for a, b in of], *zip(*of, strict=True)))
        precision, recall = hits / told if told else 0.0, hits / true if true else 0.0
        return 2 * precision * recall / (precision + recall) if hits else 0.0

    by_label = [f1([(a & {c}, b & {c}) for a, b in pairs]) for c in range(targets.shape[1])]
    exact = sum(a == b for a, b in pairs) / len(pairs)
    return {"f1_micro": f1(pairs), "f1_macro": float(np.mean(by_label)), "accuracy": exact}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_sets_of_labels(share: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    targets = (draw.random((9, 4)) < share).astype(int)
    predictions = np.where(draw.random((9, 4)) < 0.6, targets - 0.5, draw.normal(size=(9, 4)))
    for logits in (predictions, np.full((9, 4), -1.0), np.full((9, 4), 1.0), np.zeros((9, 4))):
        assert KIND.score(logits, targets, ("a", "b", "c", "d")) == pytest.approx(by_sets(logits, targets))


def test_a_text_with_a_nan_has_no_label_right() -> None:
    targets, logits = np.array([[1, 0], [1, 1]]), np.array([[1.0, -1.0], [1.0, np.nan]])
    found = KIND.score(logits, targets, ("a", "b"))
    assert found == pytest.approx(by_sets(np.array([[1.0, -1.0], [-1.0, -1.0]]), targets))
    assert found["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"expected \[N, C\] of each"):
        KIND.score(logits[:, :1], targets, ("a", "b"))


# ---- what else is asked of a kind


def test_who_knows_nothing_tells_the_odds_of_each_label() -> None:
    hot = [[1, 0], [1, 0], [1, 1], [0, 0]]
    odds = KIND.ignorance(Split(["t"] * 4, None, hot), ("a", "b"))
    assert np.exp(odds) / (1 + np.exp(odds)) == pytest.approx([4 / 6, 2 / 6])


def test_few_shots_hold_texts_with_every_label_and_some_without_any() -> None:
    hot = [[1, 0, 0]] * 40 + [[1, 1, 0]] * 5 + [[1, 1, 1]] * 4 + [[0, 0, 0]] * 6
    split = Split([str(i) for i in range(len(hot))], None, hot)
    strata = KIND.strata(split)
    assert strata == [0] * 40 + [1] * 5 + [2] * 4 + [3] * 6
    few, short = k_shot(split, 5, 1, strata)
    assert len(few) == 19 and short == {2: 4}
    assert [KIND.stratum_name(i, LABELS) for i in range(4)] == [*LABELS, "no label"]


@pytest.mark.parametrize("hot", [[[1, 0, 0], [0, 0, 1], [1, 0, 1]], [[0, 0, 0]] * 3])
def test_a_linear_model_fits_the_labels_that_occur(hot: list[list[int]]) -> None:
    targets = np.array(hot)
    numbers = KIND.encoded(targets)
    assert numbers.shape == (3, 2 if targets.any() else 3)
    assert (KIND.decoded(numbers, targets, 3) > 0).tolist() == (targets == 1).tolist()
    assert KIND.asked(targets).tolist() == [True] * 3
