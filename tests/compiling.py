"""How programs are compiled in tests."""

# Most of the time goes into compiling, a third of that into faster code than tests need. `XLA_FLAGS= pytest` has it in
# the tests' own processes all the same, and what trains on CIFAR-10 always has it.
QUICKLY = "--xla_backend_optimization_level=0"
