"""Answers of a model, and its distributions over counts."""
