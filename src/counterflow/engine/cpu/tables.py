"""Named positions in a job and in the constants of a univariate map, and the codes of the compiled maps.

A job is an array of 64-bit integers with four columns. Its first two rows are eight numbers:

    NEXT_TILE     ENTRIES      ROWS         TILE_ROWS
    WEIGHTS       ACTIVATION   UNIVARIATE   PARAMETERS

Each further row describes a matrix: its address, its rows, the elements from one row to the next, its columns. They are
the tables BELOW, STARTS, BLOCKS, CONSTANTS and LINKS (see `jobs`), the weights from row FIRST_WEIGHT on, the
inputs of the kernel and its results.
"""

NEXT_TILE, ENTRIES, ROWS, TILE_ROWS, WEIGHTS, ACTIVATION, UNIVARIATE, PARAMETERS = range(8)
BELOW, STARTS, BLOCKS, CONSTANTS, LINKS, FIRST_WEIGHT = range(2, 8)
ADDRESS, MATRIX_ROWS, STEP, COLUMNS = range(4)

AFFINE, GATED, SPLINE, CLIPPED_SPLINE, SINH_ARCSINH, SOFTPLUS, SIGMOID, SOFTCLIP, CLAMP = range(9)

# Constants of a map. BIN_FLOOR is the smallest share of a bin; softplus(UNIT) = 1 - LEAST, exp(-CLIP) = LEAST.
BOUND, LEAST, BIN_FLOOR, UNIT, CLIP, LOW, HIGH = range(7)
