"""Layers and operations whose gradients are fast on a CPU, exact, and the same on any mesh."""
