"""`recyclable tunings`: the kinds of tuning there are, with all settings of `recyclable tune`."""

from recyclable.commands.parts.listing import ListCommand

COMMAND = ListCommand(
    "tunings",
    "kinds of tuning, with the settings of tune",
    104,
    "recyclable.tunings",
    "TUNINGS",
    "tune",
)
