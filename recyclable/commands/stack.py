"""`recyclable stack`: one base + several tasks or seeds -> as many adapters, trained together."""

from recyclable.commands.parts.training import TrainingCommand

COMMAND = TrainingCommand("stack", "one base + several tasks or seeds -> as many adapters, trained at once", place=25)
