"""Strictly increasing maps of one feature, given its parameters: affine, gated, sinh-arcsinh, spline."""
