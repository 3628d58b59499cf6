"""The training loop and what it stands on: distribution, checkpoints, monitoring, ZeRO partitions."""
