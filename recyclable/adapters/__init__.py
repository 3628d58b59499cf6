"""Adapters that PEFT lacks, registered as PEFT methods as soon as anything of this room is imported."""

from recyclable.adapters import bottleneck

__all__ = ["bottleneck"]
