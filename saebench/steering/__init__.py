"""Change what a model does by its features, and measure what that does: edits, ways to choose features, controls, dose-response."""
