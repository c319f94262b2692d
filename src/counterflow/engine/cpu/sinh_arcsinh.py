"""The sinh-arcsinh map of one feature: evaluation, its pullback, the solve, and the solve of the transposed system."""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
import math

from counterflow.engine.cpu.compilation import compiled, inlined
from counterflow.engine.cpu.elementary import exp, expm1, log, log1p, tanh

LOG_2 = math.log(2)


@inlined
def _root(x):
    """Return sqrt(1 + x^2), also where x^2 overflows."""
    real, size = type(x), abs(x)
    near = min(size, real(1e9))
    return math.sqrt(real(1) + near * near) if size < real(1e9) else size


@inlined
def _asinh(x, root):
    """Return asinh(x), given root = sqrt(1 + x^2)."""
    real, size = type(x), abs(x)
    far = log(real(0.5) * size + real(0.5) * root) + real(LOG_2)
    near = log1p(min(size + size * size / (real(1) + root), real(1)))
    value = near if size < real(0.7) else far
    return value if x > 0 else -value


@inlined
def _hyperbolic(u):
    """Return sinh(u), cosh(u), tanh(u) and log cosh(u)."""
    real, size = type(u), abs(u)
    sign = real(1 if u > 0 else -1)
    rest = expm1(real(-2) * size)
    half = exp(real(0.5) * size)  # squared in two steps: exp(size) may overflow where sinh and cosh do not
    twice = rest + real(2)
    log_cosh = size + log1p(rest + real(1)) - real(LOG_2)
    return half * (real(-0.5) * rest) * half * sign, half * (real(0.5) * twice) * half, -rest / twice * sign, log_cosh


@inlined
def _clipped(m, a, bound):
    """Return e / (3 bound) and s / bound; see `SinhArcsinh`."""
    real = type(m)
    return tanh(m / (real(3) * bound)), tanh(a / bound)


@compiled
def evaluate_sinh_arcsinh(y, log_det, x, m, a, bound):
    """Compute `SinhArcsinh` for one feature, and add its log slope to log_det."""
    real = x.dtype.type
    for r in range(len(x)):
        e, s = _clipped(m[r], a[r], bound)
        root = _root(x[r])
        sinh, _, _, log_cosh = _hyperbolic(exp(bound * s) * _asinh(x[r], root) + real(3) * bound * e)
        y[r] = sinh
        log_det[r] += bound * s + log_cosh - log(root)


@compiled
def invert_sinh_arcsinh(x, log_det, m, a, bound):
    """Invert `SinhArcsinh` for one feature: x holds y on entry."""
    real = x.dtype.type
    for r in range(len(x)):
        e, s = _clipped(m[r], a[r], bound)
        root = _root(x[r])
        sinh, _, _, log_cosh = _hyperbolic(exp(-bound * s) * (_asinh(x[r], root) - real(3) * bound * e))
        x[r] = sinh
        log_det[r] += log_cosh - bound * s - log(root)


@inlined
def _partials(x, m, a, bound):
    """Return dy/dx, dlog_slope/dx, and du/dm, du/da, cosh(u), tanh(u), ds/da for u = asinh(y)."""
    real = type(x)
    e, s = _clipped(m, a, bound)
    root = _root(x)
    v, t = _asinh(x, root), exp(bound * s)
    _, cosh, tanh_u, _ = _hyperbolic(t * v + real(3) * bound * e)
    ds_da = real(1) - s * s
    dl_dx = tanh_u * t / root - x / root / root
    return cosh * t / root, dl_dx, real(1) - e * e, t * v * ds_da, cosh, tanh_u, ds_da


@compiled
def pull_sinh_arcsinh(x_bar, m_bar, a_bar, u, w, x, m, a, bound):
    """Pull cotangents u of y and w of log_det back through `SinhArcsinh` for one feature."""
    for r in range(len(x)):
        dy_dx, dl_dx, du_dm, du_da, cosh, tanh_u, ds_da = _partials(x[r], m[r], a[r], bound)
        through_u = u[r] * cosh + w[r] * tanh_u
        x_bar[r] = u[r] * dy_dx + w[r] * dl_dx
        m_bar[r] = through_u * du_dm
        a_bar[r] = through_u * du_da + w[r] * ds_da


@compiled
def solve_sinh_arcsinh(u, m_bar, a_bar, returned, v, w, x, m, a, bound):
    """Back substitution through `SinhArcsinh` for one feature; arguments as in `affine.solve_affine`."""
    for r in range(len(u)):
        dy_dx, dl_dx, du_dm, du_da, cosh, tanh_u, ds_da = _partials(x[r], m[r], a[r], bound)
        u[r] = (v[r] - returned[r] - w[r] * dl_dx) / dy_dx
        through_u = u[r] * cosh + w[r] * tanh_u
        m_bar[r] = through_u * du_dm
        a_bar[r] = through_u * du_da + w[r] * ds_da
