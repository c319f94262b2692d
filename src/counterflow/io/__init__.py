"""Files: atomic writes, checkpoints, limits on untrusted files, export to other runtimes, and data sets."""
