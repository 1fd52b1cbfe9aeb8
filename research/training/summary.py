"""The contents of summary.json, and a run's lines on the terminal."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from research import sharding
from research.data.sources import Dataset
from research.process import jax_settings
from research.training import early_stopping, utilization
from research.training.run import Training
from research.training.state import TrainState, num_params


def make(experiment: str, run: Training, results: dict[str, float], compile_seconds: float) -> dict[str, Any]:
    """Returns the contents of summary.json.

    Args:
      experiment: the experiment's name.
      run: the finished run.
      results: the results of the last epoch, and the task's final metrics.
      compile_seconds: compilation time of this process.
    """
    config, progress, mesh = run.config, run.progress, run.mesh
    unit, count = run.task.unit
    speed = progress.step * config.batch_size / progress.train_seconds
    return {
        "experiment": experiment,
        "dataset": run.dataset.name,
        "num_train_steps": progress.step,
        "num_epochs": len(run.epoch_end_steps),
        **({"num_steps": config.num_steps} if config.num_steps else {}),
        **({"extended": progress.extended} if progress.extended else {}),
        **early_stopping.summary(config, run.stop_reason),
        "global_batch_size": config.batch_size,
        **results,
        **({"best_validation_loss": progress.best[0], "best_step": progress.best[1]} if progress.best else {}),
        **({"skipped_steps": progress.skipped} if config.max_skipped_steps else {}),
        **({"rewinds": progress.rewinds} if config.max_rewinds else {}),
        "examples_per_second": speed,
        **_utilization(run, speed),
        **({f"{unit}_per_second": speed * count} if count > 1 else {}),
        "compile_seconds": compile_seconds,
        "train_seconds": progress.train_seconds,
        "wall_seconds": run.wall_seconds,
        "platform": mesh.devices.flat[0].platform,
        "device_kind": mesh.devices.flat[0].device_kind,
        "device_count": mesh.size,
        "process_count": jax.process_count(),
        "num_params": num_params(run.state),
        **conditions(run.dataset),
    }


def _utilization(run: Training, examples_per_second: float) -> dict[str, float]:
    """Returns the model FLOPs of a step and, if the peak of the devices is known, their utilization in training."""
    flops, peak = utilization.model_flops(run), utilization.peak_speed(run)
    found = {} if flops is None else {"model_flops_per_step": flops}
    return found | ({} if peak is None else {"model_flops_utilization": examples_per_second / peak})


def conditions(dataset: Dataset) -> dict[str, Any]:
    """Returns the data fingerprints, JAX settings and versions on which results depend, as in summary.json."""
    return {"data_fingerprints": dict(dataset.fingerprints), **jax_settings.settings(), **versions()}


def versions() -> dict[str, str]:
    """Returns the versions of the packages on which a run's results depend, as they appear in summary.json."""
    return {f"{package}_version": version(package) for package in ("jax", "flax", "optax", "numpy")}


def params_line(state: TrainState) -> str:
    """Returns the number of parameters, and how many of them are trained if some are frozen."""
    trained, count = sum(x.size for x in jax.tree.leaves(state.params)), num_params(state)
    return f"{count:,} parameters" + (f", {trained:,} of them trained" if trained < count else "")


def memory_line(state: TrainState) -> str:
    """Returns a line that says how much of each part of the state one device holds."""
    parts = {"parameters": state.all_params, "optimizer state": state.opt_state, "average": state.ema_params}
    shown = (
        f"{sharding.bytes_per_device(tree) / 2**20:,.2f} of {sum(x.nbytes for x in leaves) / 2**20:,.2f} MiB of {name}"
        for name, tree in parts.items()
        if (leaves := jax.tree.leaves(tree))
    )
    return f"each device holds {', '.join(shown)}"


def results_line(when: str, results: dict[str, float]) -> str:
    """Returns a line with the losses and accuracies of an epoch or an evaluation."""
    shown = (f"{name} {value:.4f}" for name, value in results.items() if name.endswith(("_loss", "_accuracy")))
    return f"{when}  " + "  ".join(shown)


def results_text(results: dict[str, Any]) -> str:
    """Formats the metrics of the held-out splits, as in "test accuracy 0.9917, test loss 0.1516"."""
    shown = (n for n in results if n.startswith(("validation_", "test_")))
    return ", ".join(f"{n.replace('_', ' ')} {results[n]:.4f}" for n in shown)


def devices_text(count: int, platform: str) -> str:
    """Formats a number of devices, as in "1 cpu device"."""
    return f"{count} {platform} device{'s' if count != 1 else ''}"


def last_lines(summary: dict[str, Any], workdir: Path) -> str:
    """Returns the lines at the end of a run: its test metrics, its speed and the folder of its record."""
    tests = results_text({n: v for n, v in summary.items() if n.startswith("test_")})
    return (
        f"{summary['experiment']} on {summary['dataset']}: {tests}\n"
        f"  {summary['examples_per_second']:,.0f} examples/s over {summary['train_seconds']:.1f} s of training "
        f"(compilation excluded: {summary['compile_seconds']:.1f} s), "
        f"{devices_text(summary['device_count'], summary['platform'])}{_utilization_part(summary)}\n"
        f"{_noise_line(summary)}"
        f"  record: {workdir}"
    )


def _utilization_part(summary: dict[str, Any]) -> str:
    used = summary.get("model_flops_utilization")
    return f", {used:.1%} model FLOPs utilization" if used is not None else ""


def _noise_line(summary: dict[str, Any]) -> str:
    size = summary.get("critical_batch_size")
    return f"  critical batch size (gradient noise scale of the last epoch): {size:,.0f}\n" if size is not None else ""
