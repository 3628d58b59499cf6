"""What old and new weights have to do with each other: measured, and used without any training."""
