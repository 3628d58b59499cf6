"""`recyclable tasks`: the kinds of tasks there are, with what their rows hold, and where each comes from."""

from recyclable.commands.parts.listing import ListCommand

COMMAND = ListCommand("tasks", "kinds of tasks, with the columns they read", 110, "recyclable.tasks", "KINDS")
