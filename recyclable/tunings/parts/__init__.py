"""What kinds of tuning are made of."""
