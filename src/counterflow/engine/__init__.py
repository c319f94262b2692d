"""Solvers of the triangular system of an autoregressive map: one contract, several bodies."""
