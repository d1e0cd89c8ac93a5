"""One number for every group: activations, gradients, criteria."""
