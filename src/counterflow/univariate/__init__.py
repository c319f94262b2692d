"""Monotone maps of one feature, given its parameters."""
