"""Univariate maps of all features of a tile, as functions that are compiled when a chain first needs them."""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
from functools import cache
from typing import Any

from numba import carray  # type: ignore[attr-defined]  # missing in its stubs

from counterflow.engine.cpu.affine import (
    evaluate_affine,
    evaluate_gated,
    evaluate_scaled,
    pull_affine,
    pull_gated,
    pull_scaled,
    solve_affine,
    solve_gated,
    solve_scaled,
)
from counterflow.engine.cpu.arrays import integers, pointer
from counterflow.engine.cpu.compilation import compiled, entry, named
from counterflow.engine.cpu.elementary import in_place_loop, slope_loop
from counterflow.engine.cpu.fields import (
    ACT_AT,
    ACT_ROWS,
    ACT_STEP,
    ACT_VALUES,
    ACT_WIDTH,
    MAP_BASE,
    MAP_CONSTANTS,
    MAP_FEATURES,
    MAP_INDEX,
    MAP_LOG_DET,
    MAP_PARAMETERS,
    MAP_PARAMS,
    MAP_PARAMS_BAR,
    MAP_SCORE,
    MAP_STEP,
    MAP_TERMS,
    MAP_WIDTH,
    MAP_WORK,
    MAP_X,
    MAP_X_BAR,
)
from counterflow.engine.cpu.sinh_arcsinh import evaluate_sinh_arcsinh, pull_sinh_arcsinh, solve_sinh_arcsinh
from counterflow.engine.cpu.spline import evaluate_spline, pull_spline, solve_spline
from counterflow.engine.cpu.tables import AFFINE, BOUND, CLIPPED_SPLINE, GATED, SINH_ARCSINH


@compiled
def rows_at(address, rows, step, like):
    """Return the (rows, step) array at an address."""
    return carray(pointer(address, like), (rows, step))


@compiled
def _log_det(like, a, i):
    """Return the row of log_det that feature i adds to, or of its cotangent."""
    term = carray(pointer(a[MAP_TERMS], a), i + 1)[i]
    return rows_at(a[MAP_LOG_DET], term + 1, a[MAP_STEP], like)[term, : a[MAP_WIDTH]]


@compiled
def _arrays(like, a):
    """Return the arrays of the arguments that all kernels share.

    Parameters are passed on with all columns: see the layout in `spline`.
    """
    D, P, step = a[MAP_FEATURES], a[MAP_PARAMETERS], a[MAP_STEP]
    x = rows_at(a[MAP_X], D, step, like)
    params = rows_at(a[MAP_PARAMS], D * P, step, like)
    constants = rows_at(a[MAP_CONSTANTS], 1, 7, like)[0]
    work = rows_at(a[MAP_WORK], 2 * ((P + 1) // 3) + 13, step, like)
    index = carray(pointer(a[MAP_INDEX], a), D)
    return x, params, constants, work, index


def _make_evaluate(name: str, evaluate: Any) -> Any:
    """Make the kernel that evaluates a map; evaluate(y, log_det, x, params, work, constants) is that of one feature."""

    @lambda function: named(f"evaluate_{name}_of_all", function)
    def of_all(like):
        a = integers(like)
        x, params, constants, work, index = _arrays(like, a)
        width, P = a[MAP_WIDTH], a[MAP_PARAMETERS]
        for i in range(len(x)):
            y_i = rows_at(a[MAP_BASE], index[i] + 1, a[MAP_STEP], like)[index[i], :width]
            evaluate(y_i, _log_det(like, a, i), x[i, :width], params[P * i : P * (i + 1)], work, constants)

    return entry(f"evaluate_{name}_entry", of_all)


def _make_pull(name: str, pull: Any) -> Any:
    """Make the kernel that pulls cotangents back.

    pull(x_bar, bars, u, w, x, params, work, constants) is that of one feature.
    """

    @lambda function: named(f"pull_{name}_of_all", function)
    def of_all(like):
        a = integers(like)
        x, params, constants, work, index = _arrays(like, a)
        width, P = a[MAP_WIDTH], a[MAP_PARAMETERS]
        x_bar = rows_at(a[MAP_X_BAR], len(x), a[MAP_STEP], like)
        bars = rows_at(a[MAP_PARAMS_BAR], len(params), a[MAP_STEP], like)
        for i in range(len(x)):
            u = rows_at(a[MAP_BASE], index[i] + 1, a[MAP_STEP], like)[index[i], :width]
            params_i, bars_i = params[P * i : P * (i + 1)], bars[P * i : P * (i + 1)]
            pull(x_bar[i, :width], bars_i, u, _log_det(like, a, i), x[i, :width], params_i, work, constants)

    return entry(f"pull_{name}_entry", of_all)


def _make_push(name: str, push: Any) -> Any:
    """Make the kernel that pushes scores through a map.

    push(u, bars, returned, v, w, x, params, work, constants) is the transposed solve of one feature.
    """

    @lambda function: named(f"push_{name}_of_all", function)
    def of_all(like):
        a = integers(like)
        x, params, constants, work, index = _arrays(like, a)
        width, P = a[MAP_WIDTH], a[MAP_PARAMETERS]
        returned = rows_at(a[MAP_X_BAR], len(x), a[MAP_STEP], like)
        v = rows_at(a[MAP_SCORE], len(x), a[MAP_STEP], like)
        bars = rows_at(a[MAP_PARAMS_BAR], len(params), a[MAP_STEP], like)
        for i in range(len(x)):
            u = rows_at(a[MAP_BASE], index[i] + 1, a[MAP_STEP], like)[index[i], :width]
            params_i, bars_i = params[P * i : P * (i + 1)], bars[P * i : P * (i + 1)]
            w = _log_det(like, a, i)
            push(u, bars_i, returned[i, :width], v[i, :width], w, x[i, :width], params_i, work, constants)

    return entry(f"push_{name}_entry", of_all)


def _affine() -> tuple[Any, Any, Any]:
    def evaluate(y, log_det, x, params, work, constants):
        evaluate_affine(y, log_det, x, params[0], params[1], constants[BOUND])

    def pull(x_bar, bars, u, w, x, params, work, constants):
        pull_affine(x_bar, bars[0], bars[1], u, w, x, params[1], constants[BOUND])

    def push(u, bars, returned, v, w, x, params, work, constants):
        solve_affine(u, bars[0], bars[1], returned, v, w, x, params[1], constants[BOUND])

    return evaluate, pull, push


def _gated() -> tuple[Any, Any, Any]:
    def evaluate(y, log_det, x, params, work, constants):
        evaluate_gated(y, log_det, x, params[0], params[1])

    def pull(x_bar, bars, u, w, x, params, work, constants):
        pull_gated(x_bar, bars[0], bars[1], u, w, x, params[0], params[1])

    def push(u, bars, returned, v, w, x, params, work, constants):
        solve_gated(u, bars[0], bars[1], returned, v, w, x, params[0], params[1])

    return evaluate, pull, push


def _scaled(code: int) -> tuple[Any, Any, Any]:
    def evaluate(y, log_det, x, params, work, constants):
        evaluate_scaled(code, y, log_det, x, params[0], params[1], work, constants)

    def pull(x_bar, bars, u, w, x, params, work, constants):
        pull_scaled(code, x_bar, bars[0], bars[1], u, w, x, params[1], work, constants)

    def push(u, bars, returned, v, w, x, params, work, constants):
        solve_scaled(code, u, bars[0], bars[1], returned, v, w, x, params[1], work, constants)

    return evaluate, pull, push


def _spline(clipped: bool) -> tuple[Any, Any, Any]:
    def evaluate(y, log_det, x, params, work, constants):
        evaluate_spline(y, log_det, x, params, work, constants, clipped)

    def pull(x_bar, bars, u, w, x, params, work, constants):
        pull_spline(x_bar, bars, u, w, x, params, work, constants, clipped)

    def push(u, bars, returned, v, w, x, params, work, constants):
        solve_spline(u, bars, returned, v, w, x, params, work, constants, clipped)

    return evaluate, pull, push


def _sinh_arcsinh() -> tuple[Any, Any, Any]:
    def evaluate(y, log_det, x, params, work, constants):
        evaluate_sinh_arcsinh(y, log_det, x, params[0], params[1], constants[BOUND])

    def pull(x_bar, bars, u, w, x, params, work, constants):
        pull_sinh_arcsinh(x_bar, bars[0], bars[1], u, w, x, params[0], params[1], constants[BOUND])

    def push(u, bars, returned, v, w, x, params, work, constants):
        solve_sinh_arcsinh(u, bars[0], bars[1], returned, v, w, x, params[0], params[1], constants[BOUND])

    return evaluate, pull, push


@cache
def map_kernels(code: int) -> tuple[Any, Any, Any]:
    """Return the kernels that evaluate a map, pull cotangents back through it and push scores through it."""
    if code == AFFINE:
        functions = _affine()
    elif code == GATED:
        functions = _gated()
    elif code <= CLIPPED_SPLINE:
        functions = _spline(code == CLIPPED_SPLINE)
    elif code == SINH_ARCSINH:
        functions = _sinh_arcsinh()
    else:
        functions = _scaled(code)
    makers = {"evaluate": _make_evaluate, "pull": _make_pull, "push": _make_push}
    evaluate, pull, push = (
        make(f"map_{code}", named(f"{kind}_map_{code}", function))
        for (kind, make), function in zip(makers.items(), functions, strict=True)
    )
    return evaluate, pull, push


@cache
def activation_kernels(name: str) -> tuple[Any, Any]:
    """Return the kernels that apply an activation to rows of a tile and multiply adjoints by its slope."""
    apply, multiply = in_place_loop(name), slope_loop(name)

    def activate_rows(like):
        a = integers(like)
        rows = rows_at(a[ACT_AT], a[ACT_ROWS], a[ACT_STEP], like)
        for u in range(len(rows)):
            apply(rows[u, : a[ACT_WIDTH]])

    def multiply_rows(like):
        a = integers(like)
        rows = rows_at(a[ACT_AT], a[ACT_ROWS], a[ACT_STEP], like)
        values = rows_at(a[ACT_VALUES], a[ACT_ROWS], a[ACT_STEP], like)
        for u in range(len(rows)):
            multiply(rows[u, : a[ACT_WIDTH]], values[u, : a[ACT_WIDTH]])

    activate, slope = named(f"activate_{name}", activate_rows), named(f"multiply_slope_{name}", multiply_rows)
    return entry(f"activate_{name}_entry", activate), entry(f"slope_{name}_entry", slope)
