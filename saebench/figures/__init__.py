"""Figures and pages: plotly plots, highlighted tokens, and the report of a run."""
