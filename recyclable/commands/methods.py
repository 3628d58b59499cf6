"""`recyclable methods`: the ways to recycle there are, with their settings, and where each comes from."""

from recyclable.commands.parts.listing import ListCommand

COMMAND = ListCommand("methods", "ways to recycle, with their settings", 100, "recyclable.methods", "METHODS")
