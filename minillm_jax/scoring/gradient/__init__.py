"""The gradient, estimated from forward passes: directions, slopes along them, and the gradient they add up to."""
