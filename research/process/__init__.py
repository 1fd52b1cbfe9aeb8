"""The process around a run: signals, terminal, exit codes, other processes, XLA's flags and cache."""
