"""Importing `research` makes malloc keep freed memory, so that using it again costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

_PROGRAM = """
import ctypes, resource
import research
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
size = 64 * 2**20
for repetition in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of the GNU C library")
@pytest.mark.parametrize("environment", [{}, {"MALLOC_ARENA_TEST": "2"}])
def test_memory_is_faulted_in_once_unless_the_environment_configures_malloc(environment):
    inherited = {name: x for name, x in os.environ.items() if name != "GLIBC_TUNABLES" and "MALLOC_" not in name}
    command = [sys.executable, "-c", _PROGRAM]
    output = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True).stdout
    page_faults = [int(line) for line in output.split()]
    assert all((count > 1000) == bool(environment) for count in page_faults[1:])
