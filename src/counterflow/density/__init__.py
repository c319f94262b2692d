"""Densities of tables: detection of column kinds, the density model, its fit and the scikit-learn estimator."""
