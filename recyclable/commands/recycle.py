"""`recyclable recycle`: outdated weights + old base + new base + task -> adapted weights of the new base."""

from recyclable.commands.parts.training import TrainingCommand

TEXT = "outdated weights + old base + new base + task -> adapted weights of the new base"
COMMAND = TrainingCommand("recycle", TEXT, place=30)
