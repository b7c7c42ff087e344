"""Matching of dictionaries: through the depth, across seeds, across models (A4 to A6)."""
