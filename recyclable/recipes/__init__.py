"""One short file per verb of the command line; each reads top to bottom like the README."""
