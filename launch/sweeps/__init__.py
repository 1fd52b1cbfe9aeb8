"""The engine of `launch.sweep`."""
