"""Decoders of all families: configuration, arrays, forward pass, loss and costs. Independent of pruning."""
