"""`recyclable tune`: base + task -> adapted weights."""

from recyclable.commands.parts.training import TrainingCommand

COMMAND = TrainingCommand("tune", "base + task -> adapted weights", place=20)
