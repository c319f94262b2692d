"""Masked networks (MADE): degrees, staircase-masked linear layers, activations."""
