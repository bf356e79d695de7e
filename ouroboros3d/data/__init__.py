"""Reading orbits for training and photos for inference."""
