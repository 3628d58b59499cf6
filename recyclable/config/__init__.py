"""Run configs: YAML and key=value in, one clear line per mistake out; the settings that verbs share."""
