"""Forward passes in, numbers out: directions, projected gradients, activation statistics."""
