"""Adapters that PEFT lacks, registered as PEFT methods."""
