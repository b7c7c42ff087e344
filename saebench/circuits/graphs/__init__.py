"""Attribution graphs: the model around one prompt as a linear map between features, and what it is worth (methods.md A1, A3)."""
