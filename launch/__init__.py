"""Commands that run an experiment somewhere else, many times, or ahead of time; one file each."""
