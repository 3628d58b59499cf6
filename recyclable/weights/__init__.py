"""Weights as data: fingerprints, lineage, adapted weights on disk, where the weights start."""
