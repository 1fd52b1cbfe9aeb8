"""Exported networks, and how they run without the code that trained them."""
