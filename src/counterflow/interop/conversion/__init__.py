"""Converters, one file per library: trained flows of other libraries to ours, see `counterflow.convert`."""
