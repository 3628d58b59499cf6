"""Interpolation distillation: the student imitates the teacher also at points between fixed weights and its own.

Interpolation distillation of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from recyclable.data.examples import Batch, model_inputs
from recyclable.objectives.distillation import kd_sum, patient_sum
from recyclable.objectives.objective import Objective
from recyclable.objectives.teachers import OnlineTeacher, Signals, compared_states
from recyclable.objectives.weight_path import WeightPath
from recyclable.tasks.parts.kind import TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Places:
    """Where on a path the student is asked: at fixed x in (0, 1), or at `draws` new ones per step."""

    points: tuple[float, ...] = ()
    draws: int = 0
    margin: float = 0.0
    """r in x = r + (1 - 2r) U(0, 1)."""
    seed: int = 0

    def __len__(self) -> int:
        return self.draws or len(self.points)

    def at(self, step: int) -> Sequence[float]:
        """The x of a step, ascending where drawn; the same on every rank."""
        if not self.draws:
            return self.points
        drawn = np.random.default_rng((self.seed, step)).random(self.draws)
        return sorted((self.margin + (1 - 2 * self.margin) * drawn).tolist())


@dataclass(frozen=True)
class Point:
    """One pass: place x on the path from fixed model `end`; `number` counts a step's points, None is the student."""

    x: float = 1.0
    end: int = 0
    number: int | None = None


class Interpolation(Objective):
    """L = s task + (1 - s) sum over x of (alpha_x T^2 KL(teacher/T || student_x/T) + beta_x patient_x).

    student_x computes with (1 - x) fixed + x own weights; x = 1, the student itself, is always one of the points. Each
    point is a pass with a backward of its own. Terms are `task`, `kd` and `patient` at x = 1, `kd_1`, `patient_1` ...
    at the points of the path, counted from 1.

    Args:
        teacher: its model is also the fixed end of the path.
        second: another frozen model, the fixed end of a second path with the same places.
        share: s, the labels' share.
        alphas, betas: one per place, x = 1 last; the second path has the same.
        left_out: modules of the student that are not interpolated.
        reduction: as in `Distillation`.
        logits: False leaves the KL terms out, for a teacher with other labels.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        kind: TaskKind,
        teacher: nn.Module,
        *,
        places: Places,
        share: float,
        alphas: Sequence[float],
        betas: Sequence[float],
        temperature: float,
        second: nn.Module | None = None,
        left_out: Collection[nn.Module] = (),
        reduction: str = "batchmean",
        logits: bool = True,
    ) -> None:
        super().__init__()
        self.student, self.kind = student, kind
        states = any(betas)
        self.teacher = OnlineTeacher(teacher, kind, with_states=states)
        self.second = None if second is None else second.requires_grad_(False).eval()
        fixed = [self.teacher.model] if self.second is None else [self.teacher.model, self.second]
        self._ends = len(fixed)
        self.temperature = temperature
        self.weights = {"task": share}
        factors = {"kd": (alphas, temperature**2)} if logits else {}
        factors.update({"patient": (betas, 1.0)} if states else {})
        for term, (by_place, scale) in factors.items():
            *path, last = by_place
            for number, weight in enumerate([last, *path * self._ends]):
                self.weights[f"{term}_{number}" if number else term] = (1.0 - share) * weight * scale
        self._places, self._kd_terms = places, student.config.num_labels if reduction == "paper" else 1
        self._path = WeightPath(student, fixed, left_out)
        self._taught: Signals | None = None

    def train(self, mode: bool = True) -> Interpolation:
        """Training mode for the student; the fixed models stay in evaluation."""
        super().train(mode)
        if self.second is not None:
            self.second.eval()
        return self

    def passes(self, step: int) -> Sequence[dict[str, Point]]:
        """x = 1 first: it asks the teacher, whose answers the other points of the batch are compared with too."""
        places = self._places.at(step)
        points = [(x, end) for end in range(self._ends) for x in places]
        return [{"point": Point()}, *({"point": Point(*point, i)} for i, point in enumerate(points, 1))]

    def borrowed(self) -> Iterator[tuple[nn.Module, nn.Parameter]]:
        return self._path.borrowed()

    def counts(self, batch: Batch) -> dict[str, int]:
        rows = self.kind.count(batch)
        each = {"task": rows, "patient": len(batch["labels"]), "kd": rows * self._kd_terms}
        return {term: each[term.partition("_")[0]] for term in self.weights}

    def sums(self, batch: Batch, point: Point = Point()) -> dict[str, torch.Tensor]:
        if point.number is None:
            self._taught = self.teacher.signals(batch)
        told, states = self._taught, "patient" in self.weights
        assert told is not None, "a point of the path before x = 1"
        self._path.go_to(point.x, point.end)
        student = self.student(**model_inputs(batch), output_hidden_states=states)
        if point.number is not None:
            self._path.require_all_mixed()
            self._path.go_to(1.0)
        answers = self.kind.answers(student.logits, batch)
        found = {}
        if states:
            assert told.states is not None, "a teacher without states"
            found["patient"] = patient_sum(compared_states(student, batch, self.student.config), told.states)
        if "kd" in self.weights:
            found["kd"] = kd_sum(self.kind, answers, told, self.temperature, batch)
        if point.number is None:
            task = self.kind.loss_sum(self.kind.rows(answers, batch), self.kind.targets(batch))
            return {"task": task, **found}
        return {f"{term}_{point.number}": value for term, value in found.items()}

    def predict(self, batch: Batch) -> torch.Tensor:
        """What the student itself says of each example [B, ..., C]."""
        return self.kind.answers(self.student(**model_inputs(batch)).logits, batch)
