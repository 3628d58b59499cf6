"""`recyclable study`: a restartable grid of the three above; one tidy results file."""

from recyclable.commands.parts.training import TrainingCommand

COMMAND = TrainingCommand("study", "a restartable grid of the three above; one tidy results file", place=40)
