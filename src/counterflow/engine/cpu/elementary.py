"""Elementary functions and activations. LLVM vectorises a loop over them: no branches, no library calls.

`real` is the dtype of x: a bare literal would turn float32 into float64.
"""

from __future__ import annotations

# Compiled functions have the types that Numba infers.
# mypy: allow-untyped-defs, no-check-untyped-defs
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from counterflow.engine.cpu.compilation import inlined, named
from counterflow.made.activations import ACTIVATIONS


@intrinsic
def two_to(typing: Any, k: Any) -> Any:
    """Return 2^k for an integral k, by exponent bits; 0 at the smallest exponent, infinity at the largest.

    The last bits of 1.5 2^mantissa + k are those of the integer k. There is no vector instruction for a conversion to
    64-bit integers before AVX-512.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, mantissa, bias = (32, 23, 127) if k.bitwidth == 32 else (64, 52, 1023)
        word = ir.IntType(bits)
        shifted = builder.fadd(args[0], ir.Constant(args[0].type, 1.5 * 2.0**mantissa))
        exponent = builder.add(builder.bitcast(shifted, word), word(bias))
        return builder.bitcast(builder.shl(exponent, word(mantissa)), args[0].type)

    return k(k), codegen


@inlined
def _is_double(real):
    """Return True for float64: known when a kernel is compiled, so that float32 takes the shorter series."""
    return np.finfo(real).maxexp > 128


@inlined
def scale_and_rest(x):
    """Return 2^k and q with exp(x) = 2^k (1 + q).

    r = x - k log 2 with |r| <= log(2) / 2, and q = r + r^2 / 2! + ... + r^13 / 13!, in float32 up to r^7 / 7!.
    """
    real, log_2 = type(x), 0.6931471805599453
    top = np.finfo(real).maxexp
    x = min(max(x, real((1 - top) * log_2)), real(top * log_2))  # in this order NaN stays NaN
    k = np.rint(x * real(1 / log_2))
    r = x - k * real(0.693359375) + k * real(2.1219444005469058e-4)  # log 2 in two parts, the first of 10 bits
    q = real(0)
    if _is_double(real):
        for factorial in (6227020800, 479001600, 39916800, 3628800, 362880, 40320):
            q = q * r + real(1 / factorial)
    for factorial in (5040, 720, 120, 24, 6, 2, 1):
        q = q * r + real(1 / factorial)
    return two_to(k), q * r


@inlined
def exp(x):
    """Return exp(x)."""
    scale, q = scale_and_rest(x)
    return scale * (type(x)(1) + q)


@inlined
def expm1(x):
    """Return exp(x) - 1 for x <= 0."""
    scale, q = scale_and_rest(x)
    return scale - type(x)(1) + scale * q


@inlined
def log1p(x):
    """Return log(1 + x) for x in 0..1, as 2 (z + z^3 / 3 + ...) with z = x / (2 + x) <= 1/3.

    The series ends with z^33 / 33, in float32 with z^15 / 15.
    """
    real = type(x)
    z = x / (real(2) + x)
    square, total = z * z, real(0)
    if _is_double(real):
        for odd in (33, 31, 29, 27, 25, 23, 21, 19, 17):  # two loops, because LLVM does not unroll longer ones
            total = total * square + real(1 / odd)
    for odd in (15, 13, 11, 9, 7, 5, 3, 1):
        total = total * square + real(1 / odd)
    return real(2) * z * total


@intrinsic
def _split_exponent(typing: Any, x: Any) -> Any:
    """Return k and m with x = 2^k m and m in 0.70..1.42, for a positive normal x."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, mantissa, root_half = (32, 23, 0x3F3504F3) if x.bitwidth == 32 else (64, 52, 0x3FE6A09E667F3BCD)
        word = ir.IntType(bits)
        number = builder.bitcast(args[0], word)
        k = builder.ashr(builder.sub(number, word(root_half)), word(mantissa))
        m = builder.bitcast(builder.sub(number, builder.shl(k, word(mantissa))), args[0].type)
        return context.make_tuple(builder, signature.return_type, [builder.sitofp(k, args[0].type), m])

    return types.UniTuple(x, 2)(x), codegen


@inlined
def log(x):
    """Return log(x) for x >= 0 that is not subnormal: k log 2 + 2 (z + z^3 / 3 + ...) with |z| <= 0.172.

    The series ends with z^21 / 21, in float32 with z^9 / 9.
    """
    real = type(x)
    k, m = _split_exponent(x)
    z = (m - real(1)) / (m + real(1))
    square, total = z * z, real(0)
    if _is_double(real):
        for odd in (21, 19, 17, 15, 13, 11):
            total = total * square + real(1 / odd)
    for odd in (9, 7, 5, 3, 1):
        total = total * square + real(1 / odd)
    value = k * real(0.693359375) + (real(2) * z * total - k * real(2.1219444005469058e-4))
    value = value if x < real(np.inf) else x  # infinity and NaN
    return value if x != real(0) else real(-np.inf)


@inlined
def tanh(x):
    """Return tanh(x)."""
    real = type(x)
    m = expm1(real(-2) * abs(x))
    return m / (m + real(2)) * real(-1 if x > 0 else 1)


@inlined
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    real = type(x)
    return real(1) / (real(1) + exp(-x))


@inlined
def softplus(x):
    """Return log(1 + exp(x))."""
    return max(x, type(x)(0)) + log1p(exp(-abs(x)))  # torch returns x from 20 on, which is 2e-9 less


@inlined
def _df_tanh(x):
    t = tanh(x)
    return type(x)(1) - t * t


@inlined
def _df_silu(x):
    real, s = type(x), sigmoid(x)
    return s * (real(1) + x * (real(1) - s))


FUNCTIONS = {  # name in ACTIVATIONS: the function and its derivative
    "relu": (lambda x: max(x, type(x)(0)), lambda x: type(x)(x > 0)),
    "leaky_relu": (lambda x: max(x, type(x)(0.01) * x), lambda x: type(x)(1 if x > 0 else 0.01)),
    "elu": (lambda x: max(x, type(x)(0)) + expm1(min(x, type(x)(0))), lambda x: exp(min(x, type(x)(0)))),
    "tanh": (lambda x: tanh(x), lambda x: _df_tanh(x)),
    "sigmoid": (lambda x: sigmoid(x), lambda x: sigmoid(x) * sigmoid(-x)),
    "silu": (lambda x: x * sigmoid(x), lambda x: _df_silu(x)),
    "softplus": (lambda x: softplus(x), lambda x: sigmoid(x)),
}


ACTIVATION_CODES = {ACTIVATIONS[name]: code for code, name in enumerate(FUNCTIONS)}


def _by_code(purpose: str, loops: Sequence[Any]) -> Any:
    """Make a function of (code, *rows) that runs loops[code](*rows), with the branches outside of the loops."""
    relu, leaky_relu, elu, tanh, sigmoid, silu, softplus = loops

    def choose(code, *rows):
        if code == 0:
            relu(*rows)
        elif code == 1:
            leaky_relu(*rows)
        elif code == 2:
            elu(*rows)
        elif code == 3:
            tanh(*rows)
        elif code == 4:
            sigmoid(*rows)
        elif code == 5:
            silu(*rows)
        else:
            softplus(*rows)

    return named(purpose, choose)


def _activation_loop(name: str, f: Any) -> Any:
    f = named(name, f)

    def loop(after, before):
        for r in range(len(after)):
            after[r] = f(before[r])

    return named(f"{name}_loop", loop)


def _adjoint_loop(name: str, df: Any) -> Any:
    df = named(f"df_{name}", df)

    def loop(adjoint, before, recorded):
        for r in range(len(recorded)):
            adjoint[r] *= df(before[r])
            recorded[r] = adjoint[r]

    return named(f"df_{name}_loop", loop)


activate = _by_code("activate", [_activation_loop(name, f) for name, (f, _) in FUNCTIONS.items()])
take_back = _by_code("take_back", [_adjoint_loop(name, df) for name, (_, df) in FUNCTIONS.items()])


# The derivative of each activation as a function of its output, and for silu of its input.
SLOPES = {
    "relu": lambda a: type(a)(a > 0),
    "leaky_relu": lambda a: type(a)(1 if a > 0 else 0.01),
    "elu": lambda a: min(a, type(a)(0)) + type(a)(1),
    "tanh": lambda a: type(a)(1) - a * a,
    "sigmoid": lambda a: a * (type(a)(1) - a),
    "silu": lambda x: _df_silu(x),
    "softplus": lambda a: -expm1(-a),
}


def slope_loop(name: str) -> Any:
    """Make the function that multiplies a row of adjoints by the slope of an activation."""
    slope = named(f"slope_{name}", SLOPES[name])

    def loop(adjoint, value):
        for r in range(len(adjoint)):
            adjoint[r] *= slope(value[r])

    return named(f"slope_{name}_loop", loop)


def in_place_loop(name: str) -> Any:
    """Make the function that applies an activation to a row."""
    f = named(f"{name}_of_one", FUNCTIONS[name][0])

    def loop(values):
        for r in range(len(values)):
            values[r] = f(values[r])

    return named(f"{name}_in_place_loop", loop)
