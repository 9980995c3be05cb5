"""The batch engine measured against the recipe users have today: ``python -m benchmarks.cpu``."""
