"""Process-level concerns of a run: signals, terminal, exit codes, multi-host, XLA flags, compilation cache."""
