"""Backends: the same operator names, proven equal to ``spec/``."""
