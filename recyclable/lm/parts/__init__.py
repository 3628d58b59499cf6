"""What kinds of language models are made of."""
