"""The record of a run: its workdir with config.json, metrics and TensorBoard events; local, gs:// or s3://."""
