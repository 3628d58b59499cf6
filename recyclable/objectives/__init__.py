"""What a model learns from: modules that turn a batch into named sums of losses."""
