"""Distillation of a flow into one that samples in one pass."""
