"""From a command to its ranks: hosts, deepspeed's launcher, and the watch over what it started."""
