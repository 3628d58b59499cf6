"""Upgrade a base model by continual pre-training and bring everything tuned on the old one along."""
