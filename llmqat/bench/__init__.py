"""Measurements of a model at work on this machine."""
