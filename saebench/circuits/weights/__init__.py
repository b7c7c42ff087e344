"""Weights-based circuits (methods.md A1): what features have to do with each other in any prompt, and what a prompt makes of it."""
