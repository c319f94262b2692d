"""Named positions in the job of a chain: an array of 64-bit integers.

It begins with CHAIN_FIELDS numbers for the whole chain. Then come STAGE_FIELDS numbers for each stage, and LEVEL_FIELDS
for each level of a network. Addresses are those of numbers in the dtype of the chain, or of tables of 64-bit integers.
"""

(
    NEXT,  # counter from which threads take tiles or chunks
    DONE,  # number of finished chunks
    N,
    TILE_ROWS,
    STEP,  # numbers from one row of a tile's buffer to the next
    TILES,
    CHUNKS,  # ranges of tiles whose weight gradients are summed separately
    STAGES,
    FEATURES,
    CONTEXT,
    X,  # address, then numbers from row to row and from column to column
    X_ROW,
    X_COLUMN,
    C,
    C_ROW,
    C_COLUMN,
    Y,
    LOG_DET,  # (N, TERMS)
    TERMS,  # 1, or the number of features where log_det is wanted by feature
    TERM_INDEX,  # table: the term that each column of LOG_DET holds
    TAPE,  # 0 where the values of a tile are not kept
    TAPE_ROWS,  # rows of one tile
    INPUT_INDEX,  # table: the row of the tape that each feature of x goes to
    OUTPUT_INDEX,  # table: the row of the tape that holds each feature of y
    LEVELS,  # position of the first level
    PANELS,  # numbers that the packed weights take
    BACK_PANELS,
    Y_BAR,
    Y_BAR_ROW,
    Y_BAR_COLUMN,
    LOG_DET_BAR,
    LOG_DET_BAR_ROW,
    LOG_DET_BAR_COLUMN,
    X_BAR,  # 0 where it is not needed
    C_BAR,
    GRADIENTS,  # buffer (CHUNKS, GRADIENT_SIZE)
    GRADIENT_SIZE,
    COLUMNS,  # most inputs of a level, and one
    WORK_ROWS,  # work space of a univariate map
    CHAIN_FIELDS,
) = range(40)

(
    KIND,
    IN,  # row of the tape with its first feature; those of the context come before it
    OUT_INDEX,  # table: the row of the tape that each feature of the result goes to
    FIRST_LEVEL,
    LEVEL_COUNT,
    PARAMETERS,
    PARAMS,  # row of the tape
    CONSTANTS,
    STAGE_TERMS,  # table: the term of log_det that each feature adds to
    EVALUATE,  # address of the compiled function
    PULL,
    PUSH,
    GROUPS,  # number of degrees, from 0 on
    BELOW,  # table (levels + 1, GROUPS + 1): how many features, hidden units and parameters have a lower degree
    BLOCKS,  # table: the degree at which each block of degrees begins, and GROUPS
    BLOCK_COUNT,
    SCALE,
    STAGE_FIELDS,
) = range(18)
PASS, DIAGONAL = range(2)

(
    UNITS_COUNT,
    INPUT,  # row of the tape with its first input
    INPUTS,  # those from the context included
    CONTEXT_INPUTS,
    BEFORE,  # row of the tape, before the activation
    AFTER,  # row of the tape, after the activation
    ACTIVATE,  # address of the compiled function; 0 for none
    MULTIPLY_SLOPE,
    SLOPE_OF,  # row of the tape from which the slope of the activation is computed
    WEIGHT,
    CONTEXT_WEIGHT,
    BIAS,
    REACH,  # table: the number of inputs that each unit sees
    PANEL_AT,  # position of the packed weights
    PANEL_COUNT,
    LOWS,
    HIGHS,
    BACK_PANEL_AT,
    BACK_PANEL_COUNT,
    BACK_LOWS,
    BACK_HIGHS,
    GRADIENT,  # position in the buffer of gradients
    GRADIENT_STEP,
    WEIGHT_BAR,  # 0 where it is not needed
    CONTEXT_WEIGHT_BAR,
    BIAS_BAR,
    LEVEL_FIELDS,
) = range(27)

# Arguments of a univariate map.
(
    MAP_FEATURES,
    MAP_PARAMETERS,
    MAP_WIDTH,
    MAP_STEP,
    MAP_X,
    MAP_PARAMS,
    MAP_LOG_DET,  # or its cotangent, at the rows of MAP_TERMS
    MAP_TERMS,
    MAP_CONSTANTS,
    MAP_BASE,  # of y, or its cotangent, at the rows of MAP_INDEX
    MAP_INDEX,
    MAP_WORK,
    MAP_X_BAR,  # when a score is pushed, the adjoint that the network has returned
    MAP_PARAMS_BAR,
    MAP_SCORE,
    MAP_ARGUMENTS,
) = range(16)

# Arguments of an activation: rows of a tile, and for its slope the rows of the values.
ACT_ROWS, ACT_WIDTH, ACT_STEP, ACT_AT, ACT_VALUES, ACT_ARGUMENTS = range(6)
