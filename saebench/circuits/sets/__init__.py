"""Several graphs, and larger units: what prompts have in common, how two differ, supernodes."""
