"""The commands, one file each: a frozen dataclass of arguments in, a run folder out. Only they and cli.py print."""
