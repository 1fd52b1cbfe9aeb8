"""What is learned: losses, metrics and plots; and the predictor, which applies a trained network."""
