"""Meshwork: one jitted train step, from one CPU to pods.

From Python or a notebook, `research.train` and `research.load` do what the command of an experiment does.
"""

from typing import TYPE_CHECKING, Any

from research.process import allocator, child, xla_flags

if TYPE_CHECKING:
    from research.api import load as load
    from research.api import train as train

__all__ = ["load", "train"]

allocator.keep_freed_memory()
xla_flags.set_flags()
child.stop_with_parent()


def __getattr__(name: str) -> Any:
    # Imported late: `launch.predict` imports this package for the image decoder, and needs neither JAX nor training.
    if name not in __all__:
        raise AttributeError(f"module 'research' has no attribute {name!r}")
    from research import api

    return getattr(api, name)
