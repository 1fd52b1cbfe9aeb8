"""Commands that launch, sweep, plan, measure or export experiments: one file per command."""
