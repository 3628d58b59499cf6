"""What a family of models is made of: derived from its structure, and for the rest one record per family."""
