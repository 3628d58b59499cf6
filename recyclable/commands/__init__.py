"""The verbs of the command line: one file each, with its arguments and what it calls; heavy imports when it runs."""
