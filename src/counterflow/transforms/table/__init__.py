"""Transforms of table columns."""
