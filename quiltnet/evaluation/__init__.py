"""Measuring a model: evaluators that know a model and their data, and yield numbers."""
