"""--describe: the network as a table, the memory of each device, the FLOPs of a step, the mesh and the config."""

import math
import shlex
from collections.abc import Iterator
from typing import Any

import jax

from research import config as config_lib
from research.network import split_frozen
from research.sharding import bytes_per_device
from research.training import utilization
from research.training.layers import layers
from research.training.run import Training
from research.units import bytes_text, count_text


def lines(run: Training) -> list[str]:
    """Compiles the train steps; returns the lines of the description."""
    return [*_network(run), *_memory(run), *_flops(run), *_mesh(run), *_config(run.config)]


def _network(run: Training) -> Iterator[str]:
    network, *inner = layers(run)
    yield f"{network.kind}, forward pass of {run.config.examples_at_once} examples:"
    table = [("layer", "type", "output", "parameters", "FLOPs per example")]
    table += [(one.path, one.kind, one.output, f"{one.num_params:,}", _count(one.flops)) for one in inner]
    table.append(("all", "", "", f"{network.num_params:,}", _count(network.flops)))
    widths = [max(map(len, column)) for column in zip(*table)]
    for row in table:
        left = (cell.ljust(width) for cell, width in zip(row[:3], widths))
        right = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:]))
        yield f"  {'  '.join([*left, *right])}"


def _count(flops: float) -> str:
    return "unknown" if math.isnan(flops) else f"{flops:,.0f}" if flops else "-"


def _memory(run: Training) -> Iterator[str]:
    state, data, batches = run.train_arguments[:3]
    program: Any = run.train_program.memory_analysis()
    held_out = [split for name, split in run.dataset.splits.items() if name != "train"] if data else []
    parts = {
        "parameters": bytes_per_device(state.all_params),
        "optimizer state": bytes_per_device(state.opt_state),
        "averaged parameters": bytes_per_device(state.ema_params),
        "batch statistics and carry": bytes_per_device(
            (split_frozen(state.model_state)[1], state.ema_model_state, state.carry)
        ),
        "data set": bytes_per_device(data) + sum(array.nbytes for split in held_out for array in split.values()),
        "batches of a dispatch": bytes_per_device(batches),
        "activations, gradients and other temporary arrays": program.temp_size_in_bytes,
        "program": program.generated_code_size_in_bytes,
    }
    # Outputs that do not take the place of donated arguments are metrics.
    parts["metrics"] = program.output_size_in_bytes - program.alias_size_in_bytes
    yield "memory of each device:"
    for name, size in parts.items():
        if size:
            yield f"  {bytes_text(size):>12}  {name}"
    available = (run.mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    yield f"  {bytes_text(sum(parts.values())):>12}  in all" + (f" of {bytes_text(available)}" if available else "")


def _flops(run: Training) -> Iterator[str]:
    flops, speed = utilization.model_flops(run), utilization.peak_speed(run)
    shown = "unknown" if flops is None else f"{count_text(flops)}FLOP"
    yield f"model FLOPs of a step: {shown} (loss and gradient, without recomputation and optimizer; over all devices)"
    if speed:
        yield f"  at the peak of these devices, {speed:,.0f} examples/s"


def _mesh(run: Training) -> Iterator[str]:
    config, count = run.config, jax.process_count()
    axes = " ".join(f"{name}={size}" for name, size in run.mesh.shape.items())
    processes = f" in {count} processes" if count > 1 else ""
    yield f"mesh: {axes} ({run.mesh.size} x {run.mesh.devices.flat[0].device_kind}{processes})"
    microbatches = config.batch_size // config.examples_at_once
    parts = f" in {microbatches} microbatches" if microbatches > 1 else ""
    yield f"train steps: {run.epoch_end_steps[-1]:,}, each of {config.batch_size} examples{parts}"


def _config(config: Any) -> Iterator[str]:
    yield "config:"
    for path, _, value in config_lib.walk(config):
        for one in value if isinstance(value, tuple) else (value,):
            yield f"  --config.{path}={shlex.quote(str(one)) if one != '' else ''}"
