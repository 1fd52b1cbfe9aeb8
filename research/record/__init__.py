"""The record of a run: its workdir, config.json, metrics and events, on any storage."""
