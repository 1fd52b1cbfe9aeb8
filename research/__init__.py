"""Meshwork: one jitted train step, from one CPU to pods."""

from research.process import xla_flags

xla_flags.set_flags()
