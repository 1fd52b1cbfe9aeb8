"""Compiler options of the tests."""

# Compiling takes most of the tests' time, and a third of that goes into optimizations that small tests do not need.
# `XLA_FLAGS= pytest` optimizes in the tests' own processes; tests that train on CIFAR-10 always do.
QUICKLY = "--xla_backend_optimization_level=0"
