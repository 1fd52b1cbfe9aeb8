"""Exported networks, and how they run without this project."""
