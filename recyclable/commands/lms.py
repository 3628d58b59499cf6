"""`recyclable lms`: the kinds of language models there are, with the settings of `recyclable pretrain`."""

from recyclable.commands.parts.listing import ListCommand

COMMAND = ListCommand(
    "lms", "kinds of language models, with the settings of pretrain", 102, "recyclable.lm", "LM_KINDS"
)
