"""Families of layers: one file per family, and the registry that finds the family of a layer."""
