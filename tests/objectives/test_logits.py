"""`logits: bf16` of tasks whose answers are text: the loss is that of rounded logits, in every way of learning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import llama, responses
from torch import nn
from torch.nn import functional as F
from worlds import make_base, make_outdated, make_task, make_upgraded, write_config

from recyclable.cli import main
from recyclable.errors import InputError
from recyclable.objectives.interpolation import Places
from recyclable.objectives.of_task import interpolated_objective, task_objective, taught_objective
from recyclable.tasks import KINDS

ALPHA, TEMPERATURE = 0.6, 2.0
TAUGHT: dict[str, Any] = {"temperature": TEMPERATURE, "reduction": "batchmean", "same_labels": True}


def labels_alone(student: nn.Module, teacher: nn.Module, **more: Any) -> Any:
    return partial(task_objective, student, **more)


def taught(student: nn.Module, teacher: nn.Module, **more: Any) -> Any:
    return partial(taught_objective, student, teaching=teacher, alpha=ALPHA, beta=0.0, top_k=None, **TAUGHT, **more)


def along_a_path(student: nn.Module, teacher: nn.Module, **more: Any) -> Any:
    path = {"places": Places((0.5,)), "share": 1 - ALPHA, "alphas": (1.0, 1.0), "betas": (0.0, 0.0)}
    return partial(interpolated_objective, student, teaching=teacher, **path, **TAUGHT, **more)


WAYS = (labels_alone, taught, along_a_path)


def rounded(model: nn.Module, data: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [M, V] as bf16 holds them, in fp32."""
    states = model.model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).last_hidden_state
    return (states.flatten(0, 1)[data["positions"]] @ model.lm_head.weight.T).float()


@pytest.mark.parametrize("way", WAYS)
def test_the_loss_is_that_of_rounded_logits(way: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    student, teacher, (data, _) = llama().eval().bfloat16(), llama().eval().bfloat16(), responses()
    for model in (student, teacher):
        model.lm_head.weight.data *= 8  # logits that lose something
    kind = KINDS.get("generation", "problem")()
    found, precise = (way(student, teacher, logits=logits)(kind=kind).eval()(data) for logits in ("bf16", "fp32"))
    with torch.no_grad():
        own, theirs = rounded(student, data), rounded(teacher, data)
    wanted = {"task": F.cross_entropy(own, data["targets"], reduction="sum")}
    if way is not labels_alone:
        q, p = ((logits / TEMPERATURE).log_softmax(-1) for logits in (own, theirs))
        wanted["kd"] = F.kl_div(q, p, reduction="sum", log_target=True)
        wanted["lm"] = (1 - ALPHA) * wanted["task"] + ALPHA * TEMPERATURE**2 * wanted["kd"]
    assert found.keys() == wanted.keys()
    for term, value in wanted.items():
        assert found[term].item() == pytest.approx(value.item(), rel=1e-5), term
        assert abs(precise[term].item() / value.item() - 1) > 1e-4, term


@pytest.mark.parametrize("way", WAYS)
def test_where_answers_are_no_text_there_are_none(way: Callable[..., Any]) -> None:
    made = way(llama(), llama(), logits="bf16")
    with pytest.raises(InputError, match="logits: is bf16, expected fp32: in classification there are none"):
        made(kind=KINDS.get("classification", "problem")())


@pytest.mark.parametrize("verb", ["tune", "recycle"])
def test_a_model_that_computes_in_fp32_has_none_in_bf16(verb: str, tmp_path: Path, capsys) -> None:
    base, task = make_base(tmp_path / "base"), make_task(tmp_path / "task")
    run = {"base": base, "task": task, "out": tmp_path / "out", "max_steps": 1, "learning_rate": 0.1, "logits": "bf16"}
    if verb == "recycle":
        outdated = make_outdated(base, task, tmp_path / "outdated")
        run |= {"method": "both", "weights": outdated, "old_base": base, "base": make_upgraded(base, tmp_path / "new")}
    assert main([verb, str(write_config(tmp_path / "run.yaml", run))]) == 2
    assert "logits: is bf16, but the model computes in float32: expected fp32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
