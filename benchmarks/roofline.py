"""Compares the roofline estimate of `launch.plan` with measured step times, for every experiment on this machine.

python -m benchmarks.roofline [--out=benchmarks/results]

The estimate uses this machine's measured speeds instead of a vendor's: the best of a matrix product, and of adding one
to an array larger than any cache. The measured time is the median of several dispatches of a run; the ratio is measured
over predicted.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import joblib

from benchmarks import command, output
from launch import job as job_lib
from launch import measure
from launch.plans.hlo import Program
from launch.plans.roofline import Roofline

_CASES = {
    "cifar_cnn": ("default", "tutorial", "airbench"),
    "char_rnn": ("default", "lru", "lstm", "gru", "simple"),
    "mnist_vae": ("default", "iwae", "burda", "conv"),
}
_STEPS, _DISPATCHES, _TRIES = 8, 5, 7


def _best_seconds(function: Callable[[], Any]) -> float:
    jax.block_until_ready(function())
    seconds = []
    for _ in range(_TRIES):
        start = time.monotonic()
        jax.block_until_ready(function())
        seconds.append(time.monotonic() - start)
    return min(seconds)


def speeds(size: int = 4096, count: int = 2**28) -> dict[str, float]:
    """Measures this machine: float32 FLOP/s of a matrix product, and bytes/s to and from memory."""
    square, buffer = jnp.ones((size, size)), [jnp.ones(count)]
    product, add = jax.jit(jnp.dot), jax.jit(lambda x: x + 1, donate_argnums=0)

    def add_in_place() -> jax.Array:  # in place, since the page faults of fresh memory cost more than the writes
        buffer[0] = add(buffer[0])
        return buffer[0]

    return {
        "flops": 2 * size**3 / _best_seconds(lambda: product(square, square)),
        "bytes": 2 * buffer[0].nbytes / _best_seconds(add_in_place),
    }


def row(experiment: str, preset: str, machine: dict[str, float], args: tuple[str, ...] = ()) -> dict[str, Any]:
    """Predicts and measures the step time of one preset."""
    argv = [f"experiments.{experiment}", f"--config={preset}", f"--config.steps_per_dispatch={_STEPS}", *args]
    run = measure.training(job_lib.parse("measure", "", measure.MeasureOptions(), argv))
    with jax.set_mesh(run.mesh):
        run.compile(train=True)
        cost = Program(run.train_program.as_text()).cost()
        measured = measure.step_seconds(run, _DISPATCHES)
    predicted = Roofline(cost["flops"] / machine["flops"], cost["bytes accessed"] / machine["bytes"], 0.0)
    return {
        "experiment": experiment,
        "preset": preset,
        "batch_size": run.config.batch_size,
        "gflop": cost["flops"] / 1e9,
        "megabytes": cost["bytes accessed"] / 1e6,
        "compute_seconds": predicted.compute,
        "memory_seconds": predicted.memory,
        "predicted_seconds": predicted.step,
        "measured_seconds": measured,
        "ratio": measured / predicted.step,
    }


def line(found: dict[str, Any]) -> str:
    """Formats a row as Markdown."""
    terms = (found[f"{name}_seconds"] * 1e3 for name in ("compute", "memory", "predicted", "measured"))
    return (
        f"| {found['experiment']} | {found['preset']} | {found['batch_size']} | {found['gflop']:.3f} | "
        f"{found['megabytes']:,.0f} | {' | '.join(f'{term:,.2f}' for term in terms)} | {found['ratio']:.2f} |"
    )


def main() -> None:
    out = output.folder()
    machine = speeds()
    device = jax.devices()[0]
    name = f"{joblib.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    print(f"{name}: {machine['flops'] / 1e9:,.0f} GFLOP/s, {machine['bytes'] / 1e9:,.1f} GB/s\n")
    print("| experiment | preset | batch | GFLOP | MB | compute | memory | predicted | measured ms | ratio |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for experiment, presets in _CASES.items():
        for preset in presets:
            rows.append(row(experiment, preset, machine))
            print(line(rows[-1]), flush=True)
            record = {"device": name, "jax": jax.__version__, "speeds": machine, "rows": rows}
            output.write(out, f"roofline_{device.platform}", record)


if __name__ == "__main__":
    command.start(main)
