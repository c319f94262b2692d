"""report.html of run folders: one file that holds its pictures and needs no network."""
