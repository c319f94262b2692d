"""Files: atomic writes, serialization, limits on untrusted files, export, data."""
