"""What methods are made of: where weights start, and what they learn from."""
