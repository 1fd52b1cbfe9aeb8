"""Tasks: losses, metrics and plots; and the predictor, which applies a trained network to host arrays."""
