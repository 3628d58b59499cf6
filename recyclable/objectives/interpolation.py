"""Interpolation distillation: the student imitates the teacher also at points between fixed weights and its own.

Interpolation distillation of "Recyclable Tuning for Continual Pre-training" (arXiv 2305.08702).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from recyclable.architectures.last_layer import narrow
from recyclable.data.examples import Batch
from recyclable.objectives.distillation import kd_sum, patient_sum
from recyclable.objectives.objective import Ask, Objective
from recyclable.objectives.task_outputs import task_outputs
from recyclable.objectives.teachers import FrozenModel, OnlineTeacher, Signals, compared_states
from recyclable.objectives.weight_path import WeightPath
from recyclable.ranges import LOSS, phase
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


class AlongPath(Objective):
    """A student that is asked at points of the path too; what it is asked is left to its kinds.

    Each point is a pass with a backward of its own. Terms of the points are counted from 1: `kd_1`, `patient_1` ...

    Args:
        teacher: its model is also the fixed end of the path.
        places: where on it.
        second: another frozen model, the fixed end of a second path with the same places.
        left_out: modules of the student that are not interpolated.
        users: modules beside the student's that compute with one of its modules' weights -> that module.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: FrozenModel[Any],
        *,
        places: Places,
        second: nn.Module | None,
        left_out: Collection[nn.Module],
        users: Mapping[nn.Module, nn.Module] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.second = None if second is None else second.requires_grad_(False).eval()
        fixed = [self.teacher.model] if self.second is None else [self.teacher.model, self.second]
        self._ends, self._places = len(fixed), places
        self._path = WeightPath(student, fixed, left_out, users)
        self._taught: Any = None

    def weighted(self, term: str, by_place: Sequence[float]) -> dict[str, float]:
        """Each of a term's numbers -> its weight, from one per place, x = 1 last; both paths have the same."""
        *path, last = by_place
        return {f"{term}_{i}" if i else term: weight for i, weight in enumerate([last, *path * self._ends])}

    def train(self, mode: bool = True) -> Self:
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

    def sums(self, batch: Batch, point: Point = Point()) -> dict[str, torch.Tensor]:
        if point.number is None:
            self._taught = self.teacher.signals(batch)
        assert self._taught is not None, "a point of the path before x = 1"
        self._path.go_to(point.x, point.end)
        found = self.compared(batch, self._taught, own=point.number is None)
        if point.number is None:
            return found
        self._path.require_all_mixed()
        return {f"{term}_{point.number}": value for term, value in found.items()}

    def forward(self, batch: Batch, predict: bool = False, ask: Ask | None = None, **of_pass: Any) -> Any:
        """The student itself, unless a pass says otherwise; it stays at a pass's point for that one's backward."""
        self._path.go_to(1.0)
        return super().forward(batch, predict, ask, **of_pass)

    @abstractmethod
    def compared(self, batch: Batch, told: Any, own: bool) -> dict[str, torch.Tensor]:
        """Term -> sum, of the student where it is, compared with what the teacher said.

        Args:
            own: it is at x = 1, where labels are learned from as well.
        """


class Interpolation(AlongPath):
    """L = s task + (1 - s) sum over x of (alpha_x T^2 KL(teacher/T || student_x/T) + beta_x patient_x).

    student_x computes with (1 - x) fixed + x own weights; x = 1, the student itself, is always one of the points, where
    terms are `task`, `kd` and `patient`.

    Args:
        teacher, places, second, left_out: as for `AlongPath`.
        share: s, the labels' share.
        alphas, betas: one per place, x = 1 last; the second path has the same.
        reduction: as in `Distillation`.
        same_labels: False leaves the KL terms out, for a teacher with other labels.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        kind: TaskKind,
        teacher: OnlineTeacher,
        *,
        places: Places,
        share: float,
        alphas: Sequence[float],
        betas: Sequence[float],
        temperature: float,
        second: nn.Module | None = None,
        left_out: Collection[nn.Module] = (),
        reduction: str = "batchmean",
        same_labels: bool = True,
    ) -> None:
        super().__init__(student, teacher, places=places, second=second, left_out=left_out)
        self.kind, self.temperature = kind, temperature
        narrow(student)
        self.weights = {"task": share}
        if same_labels:
            self.weights |= self.weighted("kd", [(1.0 - share) * alpha * temperature**2 for alpha in alphas])
        if teacher.with_states:
            self.weights |= self.weighted("patient", [(1.0 - share) * beta for beta in betas])
        self._kd_terms = student.config.num_labels if reduction == "paper" else 1

    def counts(self, batch: Batch) -> dict[str, int]:
        rows = self.kind.count(batch)
        each = {"task": rows, "patient": len(batch["labels"]), "kd": rows * self._kd_terms}
        return {term: each[term.partition("_")[0]] for term in self.weights}

    def compared(self, batch: Batch, told: Signals, own: bool) -> dict[str, torch.Tensor]:
        student = task_outputs(self.student, batch, states="patient" in self.weights)
        with phase(LOSS):
            return self._compared(student, told, batch, own)

    def _compared(self, student: Any, told: Signals, batch: Batch, own: bool) -> dict[str, torch.Tensor]:
        answers = self.kind.answers(student.logits, batch)
        found = {}
        if "patient" in self.weights:
            assert told.states is not None, "a teacher without states"
            found["patient"] = patient_sum(compared_states(student, batch, self.student.config), told.states)
        if "kd" in self.weights:
            found["kd"] = kd_sum(self.kind, answers, told, self.temperature, batch)
        if own:
            task = self.kind.loss_sum(self.kind.rows(answers, batch), self.kind.targets(batch))
            return {"task": task, **found}
        return found

    def predict(self, batch: Batch) -> torch.Tensor:
        """What the student itself says of each example [B, ..., C]."""
        return self.kind.answers(task_outputs(self.student, batch).logits, batch)
