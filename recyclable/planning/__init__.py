"""What a run will take before it is run: memory and time, from a model's structure alone."""
