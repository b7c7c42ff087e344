"""What attention heads do: roles, their features, retrieval; those of Lorsa too."""
