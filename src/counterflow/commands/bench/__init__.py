"""counterflow bench: time both directions of an autoregressive layer, here and in other libraries."""
