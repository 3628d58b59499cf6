"""What kinds of tasks are made of: files and rows in, samples, scores."""
