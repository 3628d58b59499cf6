"""The training loop and what it stands on: checkpoints, monitoring, ZeRO partitions."""

from recyclable.host import use_cpu_if_alone

use_cpu_if_alone()  # before anything here imports deepspeed, which asks once and warns
