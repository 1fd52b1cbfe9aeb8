"""The engine of `launch.sweep`: search space, study, workers, record and fits."""
