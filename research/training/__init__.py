"""The train loop: state, steps, dispatches, checkpoints, populations."""
