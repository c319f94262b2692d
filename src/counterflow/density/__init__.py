"""Densities of tables: detection of column types, the model, the scikit-learn estimator."""
