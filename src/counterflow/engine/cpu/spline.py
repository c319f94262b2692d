"""Rational-quadratic splines of one feature: evaluation, its pullback, the solve, and the transposed solve."""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
import numpy as np

from counterflow.engine.cpu.arrays import copy, fill
from counterflow.engine.cpu.compilation import compiled
from counterflow.engine.cpu.elementary import exp, log, sigmoid, softplus
from counterflow.engine.cpu.tables import BIN_FLOOR, BOUND, CLIP, LEAST, UNIT

# The formulas and letters are those of `RationalQuadraticSpline`. The work space `knots` holds the edges of the bins,
# xs and ys, (bins + 1, rows) each, and then `found`: for the bin in which each row lies its ends, the raw slopes and
# the slopes at both ends, its number, and two more rows. All matrices keep the layout C, with columns beyond the rows
# that count: the compiler does not know the stride of a part of the columns, and makes no vector code then. These are
# the rows of `found`:
X0, X1, Y0, Y1, D0, D1, S0, S1, PLACE, MEAN_X, MEAN_Y = range(11)


@compiled
def _edges(edges, highest, total, raw, constants, clipped, width):
    """Fill the edges (bins + 1, width) from raw shares (bins, width); highest and total are work space."""
    bins, real, bound, floor = len(raw), edges.dtype.type, constants[BOUND], constants[BIN_FLOOR]
    for k in range(bins):
        if clipped:
            _clip(edges[k + 1, :width], raw[k], constants[CLIP] / real(2))
        else:
            copy(edges[k + 1, :width], raw[k])
    copy(highest[:width], edges[1])
    for k in range(2, bins + 1):
        for r in range(width):
            highest[r] = max(highest[r], edges[k, r])
    fill(total[:width], 0)
    for k in range(1, bins + 1):
        for r in range(width):
            edges[k, r] = exp(edges[k, r] - highest[r])
            total[r] += edges[k, r]
    share, rest = highest, real(1) - floor * real(bins)
    fill(share[:width], 0)
    for k in range(1, bins):
        for r in range(width):
            share[r] += floor + rest * edges[k, r] / total[r]
            edges[k, r] = bound * (real(2) * share[r] - real(1))
    fill(edges[0, :width], -bound)
    fill(edges[bins, :width], bound)


@compiled
def _clip(to, row, bound):
    for r in range(len(to)):
        to[r] = row[r] / (type(bound)(1) + abs(row[r]) / bound)


@compiled
def _slopes(found, constants, clipped, width):
    """Fill the slopes, rows S0 and S1, from the raw slopes, rows D0 and D1."""
    least, unit = constants[LEAST], constants[UNIT]
    for k in range(2):
        if clipped:
            _clip(found[S0 + k, :width], found[D0 + k], constants[CLIP])
        for r in range(width):
            found[S0 + k, r] = exp(found[S0 + k, r]) if clipped else least + softplus(found[D0 + k, r] + unit)


@compiled
def _slopes_by_raw(found, constants, clipped, width):
    """Overwrite the raw slopes, rows D0 and D1, with the derivatives of the slopes by them."""
    unit, most = constants[UNIT], constants[CLIP]
    for k in range(2):
        for r in range(width):
            rest = type(most)(1) + abs(found[D0 + k, r]) / most
            found[D0 + k, r] = found[S0 + k, r] / (rest * rest) if clipped else sigmoid(found[D0 + k, r] + unit)


@compiled
def _find_bin(value, along_x, params, knots, constants, clipped):
    """Fill `knots` for the bins in which the values lie, and return its rows `found`."""
    bins, width = (len(params) + 1) // 3, len(value)
    xs, ys, found = knots[: bins + 1], knots[bins + 1 : 2 * bins + 2], knots[2 * bins + 2 :]
    _edges(xs, found[D0], found[D1], params[:bins], constants, clipped, width)
    _edges(ys, found[D0], found[D1], params[bins : 2 * bins], constants, clipped, width)
    edges, slopes = xs if along_x else ys, params[2 * bins :]
    for at, row in ((X0, xs[0]), (X1, xs[1]), (Y0, ys[0]), (Y1, ys[1]), (D1, slopes[0])):
        copy(found[at, :width], row)
    fill(found[D0, :width], 0)  # a raw slope of 0 is a slope of 1, as at both ends of the spline
    fill(found[PLACE, :width], 0)
    for k in range(1, bins):
        last = k == bins - 1
        for r in range(width):
            beyond = value[r] >= edges[k, r]
            found[X0, r] = xs[k, r] if beyond else found[X0, r]
            found[X1, r] = xs[k + 1, r] if beyond else found[X1, r]
            found[Y0, r] = ys[k, r] if beyond else found[Y0, r]
            found[Y1, r] = ys[k + 1, r] if beyond else found[Y1, r]
            found[D0, r] = slopes[k - 1, r] if beyond else found[D0, r]
            found[PLACE, r] += found.dtype.type(beyond)
            if last:
                found[D1, r] = found.dtype.type(0) if beyond else found[D1, r]
            else:
                found[D1, r] = slopes[k, r] if beyond else found[D1, r]
    _slopes(found, constants, clipped, width)
    return found


@compiled
def invert_spline(x, log_det, params, knots, constants, clipped):
    """Invert the spline for one feature, as `RationalQuadraticSpline.inverse` does: x holds y on entry."""
    real, found, bound = x.dtype.type, _find_bin(x, False, params, knots, constants, clipped), constants[BOUND]
    slope = found[MEAN_X]
    for r in range(len(x)):
        width, height = found[X1, r] - found[X0, r], found[Y1, r] - found[Y0, r]
        d0, d1 = found[S0, r], found[S1, r]
        s, up, inside = height / width, x[r] - found[Y0, r], abs(x[r]) < bound
        bend = d0 + d1 - real(2) * s
        a, b, c = height * (s - d0) + up * bend, height * d0 - up * bend, -s * up
        root, forth = np.sqrt(max(b * b - real(4) * a * c, real(0))), b >= real(0)
        t = (real(2) * c if forth else root - b) / (-b - root if forth else real(2) * a)
        t = min(max(t, real(0)), real(1))
        below = s + bend * t * (real(1) - t)
        above = d1 * t * t + real(2) * s * t * (real(1) - t) + d0 * (real(1) - t) * (real(1) - t)
        off = height * (s * t * t + d0 * t * (real(1) - t)) - up * below
        t = min(max(t - off * below / (height * s * above), real(0)), real(1))
        below = s + bend * t * (real(1) - t)
        above = d1 * t * t + real(2) * s * t * (real(1) - t) + d0 * (real(1) - t) * (real(1) - t)
        x[r] = found[X0, r] + t * width if inside else x[r]
        slope[r] = s * s * above / (below * below) if inside else real(1)
    for r in range(len(x)):
        log_det[r] -= log(slope[r])


@compiled
def evaluate_spline(y, log_det, x, params, knots, constants, clipped):
    """Compute the spline for one feature, and add its log slope to log_det."""
    real = x.dtype.type
    found = _find_bin(x, True, params, knots, constants, clipped)
    bound, slope = constants[BOUND], found[MEAN_X]
    for r in range(len(x)):
        width, height = found[X1, r] - found[X0, r], found[Y1, r] - found[Y0, r]
        d0, d1 = found[S0, r], found[S1, r]
        s, t, inside = height / width, (x[r] - found[X0, r]) / width, abs(x[r]) < bound
        rest = real(1) - t
        p = t * rest
        below = s + (d0 + d1 - real(2) * s) * p
        above = d1 * t * t + real(2) * s * p + d0 * rest * rest
        y[r] = found[Y0, r] + height * (s * t * t + d0 * p) / below if inside else x[r]
        slope[r] = s * s * above / (below * below) if inside else real(1)
    for r in range(len(x)):
        log_det[r] += log(slope[r])


@compiled
def _fill_adjoints(solving, u, x_bar, bars, returned, v, w, x, params, knots, constants, clipped):
    """Use the derivatives of `RationalQuadraticSpline.forward` for one feature; see the two functions below."""
    bins, real, bound = (len(params) + 1) // 3, u.dtype.type, constants[BOUND]
    found = _find_bin(x, True, params, knots, constants, clipped)
    xs, ys = knots[: bins + 1], knots[bins + 1 : 2 * bins + 2]
    _slopes_by_raw(found, constants, clipped, len(u))
    # An edge is bound (2 share - 1), where share is spread / (2 bound) times the sum of the softmax before the edge,
    # plus BIN_FLOOR times the number of the edge.
    rest = real(1) - constants[BIN_FLOOR] * real(bins)
    spread, floor = real(2) * rest * bound, constants[BIN_FLOOR] / rest
    for r in range(len(u)):
        x0, y0, place = found[X0, r], found[Y0, r], found[PLACE, r]
        width, height = found[X1, r] - x0, found[Y1, r] - y0
        d0, d1 = found[S0, r], found[S1, r]
        s, t, inside = height / width, (x[r] - x0) / width, abs(x[r]) < bound
        rest, bend = real(1) - t, d0 + d1 - real(2) * s
        p = t * rest
        over, below = s * t * t + d0 * p, s + bend * p  # y = y0 + height over / below
        above = d1 * t * t + real(2) * s * p + d0 * rest * rest  # l = 2 log s + log above - 2 log below
        dabove_dt = real(2) * (d1 * t + s * (rest - t) - d0 * rest)
        dbelow_dt = bend * (rest - t)
        dl_dx = (dabove_dt / above - real(2) * dbelow_dt / below) / width
        if solving:
            given = v[r] - returned[r]
            u[r] = (given - w[r] * dl_dx) * below * below / (s * s * above) if inside else given
        else:
            x_bar[r] = u[r] * s * s * above / (below * below) + w[r] * dl_dx if inside else u[r]
        to_y, to_l = u[r] if inside else real(0), w[r] if inside else real(0)

        to_over, to_above = to_y * height / below, to_l / above
        to_below = -(to_over * over + real(2) * to_l) / below
        to_bend = to_below * p
        to_s = real(2) * to_l / s + to_above * real(2) * p + to_over * t * t + to_below - real(2) * to_bend
        to_t = to_over * (real(2) * s * t + d0 * (rest - t)) + to_below * dbelow_dt + to_above * dabove_dt
        to_height = to_y * over / below + to_s / width
        to_width = -(to_s * s + to_t * t) / width
        to_d0 = to_above * rest * rest + to_over * p + to_bend
        to_d1 = to_above * t * t + to_bend
        last = place == real(bins - 1)
        found[X0, r] = spread * (-to_t / width - to_width)
        found[X1, r] = real(0) if last else spread * to_width
        found[Y0, r] = spread * (to_y - to_height)
        found[Y1, r] = real(0) if last else spread * to_height
        found[D0, r] *= to_d0
        found[D1, r] *= to_d1
        found[MEAN_X, r] = found[X0, r] * ((x0 + bound) / spread - floor * place)
        found[MEAN_X, r] += found[X1, r] * ((x0 + width + bound) / spread - floor * (place + real(1)))
        found[MEAN_Y, r] = found[Y0, r] * ((y0 + bound) / spread - floor * place)
        found[MEAN_Y, r] += found[Y1, r] * ((y0 + height + bound) / spread - floor * (place + real(1)))
    for k in range(bins):
        for r in range(len(u)):
            before, within = real(k < found[PLACE, r]), real(k <= found[PLACE, r])
            to_x = before * found[X0, r] + within * found[X1, r] - found[MEAN_X, r]
            to_y = before * found[Y0, r] + within * found[Y1, r] - found[MEAN_Y, r]
            bars[k, r] = to_x * ((xs[k + 1, r] - xs[k, r]) / spread - floor)
            bars[bins + k, r] = to_y * ((ys[k + 1, r] - ys[k, r]) / spread - floor)
    for k in range(2 * bins if clipped else 0):
        for r in range(len(u)):
            flat = real(1) + abs(params[k, r]) / (constants[CLIP] / real(2))
            bars[k, r] /= flat * flat
    for k in range(bins - 1):
        for r in range(len(u)):
            left, right = real(k + 1 == found[PLACE, r]), real(k == found[PLACE, r])
            bars[2 * bins + k, r] = left * found[D0, r] + right * found[D1, r]


@compiled
def solve_spline(u, bars, returned, v, w, x, params, knots, constants, clipped):
    """Back substitution through the spline for one feature; arguments as in `affine.solve_affine`, bars (P, rows)."""
    _fill_adjoints(True, u, u, bars, returned, v, w, x, params, knots, constants, clipped)


@compiled
def pull_spline(x_bar, bars, u, w, x, params, knots, constants, clipped):
    """Pull cotangents u of y and w of log_det back through the spline for one feature, to x_bar and bars (P, rows)."""
    _fill_adjoints(False, u, x_bar, bars, u, u, w, x, params, knots, constants, clipped)
