"""Affine maps of one feature: evaluation, its pullback, the solve, and the solve of the transposed system."""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
import math

from counterflow.engine.cpu.compilation import compiled
from counterflow.engine.cpu.elementary import exp, log1p, sigmoid, softplus, tanh
from counterflow.engine.cpu.tables import CLIP, HIGH, LEAST, LOW, SIGMOID, SOFTCLIP, SOFTPLUS, UNIT


@compiled
def invert_affine(x, log_det, m, a, bound):
    """Invert `Affine` for one feature: x holds y on entry."""
    for r in range(len(x)):
        s = bound * tanh(a[r] / bound)
        x[r] = (x[r] - m[r]) * exp(-s)
        log_det[r] -= s


@compiled
def invert_gated(x, log_det, m, a):
    """Invert `Gated` for one feature: x holds y on entry."""
    real = x.dtype.type
    for r in range(len(x)):
        z = a[r] + real(2)
        e = exp(-abs(z))
        x[r] = m[r] + (x[r] - m[r]) * (real(1) + e) / (real(1) if z > 0 else e)  # divided by sigmoid(z)
        log_det[r] += log1p(e) - min(z, real(0))


@compiled
def solve_affine(u, m_bar, a_bar, returned, v, w, x, a, bound):
    """Back substitution through `Affine` for one feature.

    Args:
        u, m_bar, a_bar: filled with the solution and the adjoints of the parameters.
        returned: the adjoint of the feature that comes back through the network.
        v, w: right-hand side and the cotangent of log_det.
    """
    real = u.dtype.type
    for r in range(len(u)):
        t = tanh(a[r] / bound)
        dy_dx, ds_da = exp(bound * t), real(1) - t * t
        u[r] = (v[r] - returned[r]) / dy_dx
        m_bar[r] = u[r]
        a_bar[r] = (u[r] * x[r] * dy_dx + w[r]) * ds_da


@compiled
def solve_gated(u, m_bar, a_bar, returned, v, w, x, m, a):
    """Back substitution through `Gated` for one feature; arguments as in `solve_affine`."""
    real = u.dtype.type
    for r in range(len(u)):
        s, rest = sigmoid(a[r] + real(2)), sigmoid(-a[r] - real(2))
        u[r] = (v[r] - returned[r]) / s
        m_bar[r] = u[r] * rest
        a_bar[r] = (u[r] * s * (x[r] - m[r]) + w[r]) * rest


@compiled
def scales(code, scale, log_scale, a, constants):
    """Fill scale and log_scale with those of `ForeignAffine`."""
    real, least, unit, most = a.dtype.type, constants[LEAST], constants[UNIT], constants[CLIP]
    if code in (SOFTPLUS, SIGMOID):
        for r in range(len(scale)):
            scale[r] = least + (softplus(a[r] + unit) if code == SOFTPLUS else sigmoid(a[r] + real(2)))
        for r in range(len(scale)):  # a loop of its own: the library's logarithm is not vectorised
            log_scale[r] = math.log(scale[r])
    else:
        low, high = constants[LOW], constants[HIGH]
        for r in range(len(scale)):
            clipped = a[r] / (real(1) + abs(a[r]) / most) if code == SOFTCLIP else min(max(a[r], low), high)
            log_scale[r] = clipped
            scale[r] = exp(clipped)


@compiled
def invert_scaled(code, x, log_det, m, a, work, constants):
    """Invert `ForeignAffine` for one feature: x holds y on entry."""
    scale, log_scale = work[0, : len(x)], work[1, : len(x)]
    scales(code, scale, log_scale, a, constants)
    for r in range(len(x)):
        x[r] = (x[r] - m[r]) / scale[r]
        log_det[r] -= log_scale[r]


@compiled
def slopes_of_log_scale(code, slope, scale, a, constants):
    """Fill slope with the derivative of the log scale of `ForeignAffine` by a."""
    real, unit, most = a.dtype.type, constants[UNIT], constants[CLIP]
    low, high = constants[LOW], constants[HIGH]
    for r in range(len(scale)):
        if code == SOFTPLUS:
            slope[r] = sigmoid(a[r] + unit) / scale[r]
        elif code == SIGMOID:
            slope[r] = sigmoid(a[r] + real(2)) * sigmoid(-a[r] - real(2)) / scale[r]
        elif code == SOFTCLIP:
            rest = real(1) + abs(a[r]) / most
            slope[r] = real(1) / (rest * rest)
        else:
            slope[r] = real(a[r] >= low and a[r] <= high)


@compiled
def solve_scaled(code, u, m_bar, a_bar, returned, v, w, x, a, work, constants):
    """Back substitution through `ForeignAffine` for one feature; arguments as in `solve_affine`."""
    scale, slope = work[0, : len(u)], work[1, : len(u)]
    scales(code, scale, slope, a, constants)
    slopes_of_log_scale(code, slope, scale, a, constants)
    for r in range(len(u)):
        u[r] = (v[r] - returned[r]) / scale[r]
        m_bar[r] = u[r]
        a_bar[r] = (u[r] * x[r] * scale[r] + w[r]) * slope[r]


@compiled
def evaluate_affine(y, log_det, x, m, a, bound):
    """Compute `Affine` for one feature, and add its log slope to log_det."""
    for r in range(len(x)):
        s = bound * tanh(a[r] / bound)
        y[r] = m[r] + x[r] * exp(s)
        log_det[r] += s


@compiled
def evaluate_gated(y, log_det, x, m, a):
    """Compute `Gated` for one feature, and add its log slope to log_det."""
    real = x.dtype.type
    for r in range(len(x)):
        z = a[r] + real(2)
        e = exp(-abs(z))
        s = (real(1) if z > 0 else e) / (real(1) + e)
        y[r] = m[r] + s * (x[r] - m[r])
        log_det[r] -= log1p(e) - min(z, real(0))


@compiled
def evaluate_scaled(code, y, log_det, x, m, a, work, constants):
    """Compute `ForeignAffine` for one feature, and add its log slope to log_det."""
    scale, log_scale = work[0, : len(x)], work[1, : len(x)]
    scales(code, scale, log_scale, a, constants)
    for r in range(len(x)):
        y[r] = m[r] + x[r] * scale[r]
        log_det[r] += log_scale[r]


@compiled
def pull_affine(x_bar, m_bar, a_bar, u, w, x, a, bound):
    """Pull cotangents u of y and w of log_det back through `Affine` for one feature."""
    real = u.dtype.type
    for r in range(len(x)):
        t = tanh(a[r] / bound)
        dy_dx = exp(bound * t)
        x_bar[r] = u[r] * dy_dx
        m_bar[r] = u[r]
        a_bar[r] = (u[r] * x[r] * dy_dx + w[r]) * (real(1) - t * t)


@compiled
def pull_gated(x_bar, m_bar, a_bar, u, w, x, m, a):
    """Pull cotangents back through `Gated` for one feature; arguments as in `pull_affine`."""
    real = u.dtype.type
    for r in range(len(x)):
        z = a[r] + real(2)
        e = exp(-abs(z))
        s, rest = (real(1) if z > 0 else e) / (real(1) + e), (e if z > 0 else real(1)) / (real(1) + e)
        x_bar[r] = u[r] * s
        m_bar[r] = u[r] * rest
        a_bar[r] = (u[r] * s * (x[r] - m[r]) + w[r]) * rest


@compiled
def pull_scaled(code, x_bar, m_bar, a_bar, u, w, x, a, work, constants):
    """Pull cotangents back through `ForeignAffine` for one feature; arguments as in `pull_affine`."""
    scale, slope = work[0, : len(u)], work[1, : len(u)]
    scales(code, scale, slope, a, constants)
    slopes_of_log_scale(code, slope, scale, a, constants)
    for r in range(len(u)):
        x_bar[r] = u[r] * scale[r]
        m_bar[r] = u[r]
        a_bar[r] = (u[r] * x[r] * scale[r] + w[r]) * slope[r]
