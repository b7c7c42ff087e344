"""Circuit discovery: which latents, heads and edges a behaviour needs, by patching, by gradients, by discrete codes (A2, T19)."""
