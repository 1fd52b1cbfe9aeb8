"""Compiler options of the tests."""

# Compiling takes most of the tests' time, and more than half of that goes into optimizations and kernel generators that
# small tests do not need. `XLA_FLAGS= pytest` compiles as users do in the tests' own processes; tests that train on
# CIFAR-10 always do.
QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
