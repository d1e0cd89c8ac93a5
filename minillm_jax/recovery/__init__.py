"""Recovery of a pruned model: low-rank adapters, distillation, updates from forward passes."""
