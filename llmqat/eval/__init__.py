"""Judging a model: perplexity, and what a bit width costs in operations and bytes."""
