"""`recyclable pretrain`: continual pre-training: base + corpus -> upgraded base."""

from recyclable.commands.parts.training import TrainingCommand

COMMAND = TrainingCommand("pretrain", "continual pre-training: base + corpus -> upgraded base", place=10)
