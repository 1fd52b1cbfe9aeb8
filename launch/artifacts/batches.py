"""Runs a function of an artifact batch by batch, and reports progress and speed on stderr."""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from launch.artifacts.image_files import ImageFiles

if TYPE_CHECKING:
    from launch.artifacts.runtimes import Runtime

BATCH_SIZE = 64  # on a CPU, 256 halves the speed of the tutorial CNN
_PROGRESS_SECONDS = 10.0  # between progress lines where stderr is not a terminal


def run(
    runtime: "Runtime", function: str, inputs: Mapping[str, np.ndarray | ImageFiles], unit: str
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the outputs of each batch, by name; after the last batch, reports the network's speed.

    Args:
      runtime: runs the functions of an artifact.
      function: a name in the manifest.
      inputs: by name, [n, ...] each; scalars are passed to every batch.
      unit: what the inputs are, in the plural, for the report.
    """
    count = max(len(x) for x in inputs.values() if x.ndim)
    size = min(BATCH_SIZE, count)
    seconds, compiled_before = 0.0, runtime.compile_seconds
    for start in _with_progress(range(0, count, size), count, function, unit):
        # The last batch is padded with the last example, so that every batch has the same shape.
        index = np.minimum(np.arange(start, start + size), count - 1)
        batch = {name: x[index] if x.ndim else np.asarray(x) for name, x in inputs.items()}
        began = time.monotonic()
        outputs = runtime(function, batch)
        seconds += time.monotonic() - began
        yield {name: x[: count - start] for name, x in outputs.items()}
    compiled = runtime.compile_seconds - compiled_before
    report(runtime, f"{function}: {count:,}", unit, count, seconds - compiled, compiled)


def concatenate(outputs: Iterator[dict[str, np.ndarray]], name: str) -> np.ndarray:
    """Returns one output of all batches."""
    return np.concatenate([batch[name] for batch in outputs])


def report(runtime: "Runtime", what: str, unit: str, count: int, seconds: float, compiled: float) -> None:
    """Prints the speed of `count` of `unit` in `seconds`, and the seconds of compilation, to stderr."""
    speed = f"{count / seconds:,.0f} {unit}/s"
    print(f"{what} {unit}, {speed} ({runtime.name}; compilation excluded: {compiled:.2f} s)", file=sys.stderr)


def _with_progress(starts: range, count: int, function: str, unit: str) -> Iterator[int]:
    """Yields `starts`; shows a progress bar on a terminal, and now and then a line elsewhere."""
    began = last = time.monotonic()
    with tqdm(total=count, desc=function, unit=f" {unit}", dynamic_ncols=True, disable=None, leave=False) as bar:
        for start in starts:
            yield start
            done, now = min(start + starts.step, count), time.monotonic()
            bar.update(done - start)
            # tqdm disables itself where stderr is not a terminal.
            if bar.disable and now - last > _PROGRESS_SECONDS and done < count:
                last, left = now, tqdm.format_interval((now - began) / done * (count - done))
                print(f"{function}: {done:,} of {count:,} {unit}, {left} left", file=sys.stderr, flush=True)
