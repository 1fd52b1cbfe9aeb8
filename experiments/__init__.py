"""Experiments, one file each: docstring, configs, task."""
