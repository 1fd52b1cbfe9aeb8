"""The output of `launch.plan` in words and as a Markdown table."""

from collections.abc import Mapping
from typing import Any

from launch.plans.lowering import Workload
from research.chips import CHIPS
from research.units import bytes_text, count_text

_HEAD = (
    "topology|mesh|batch|microbatch|GiB/chip|compute ms|memory ms|interconnect ms|step ms|examples/s|efficiency|hours"
)


def _seconds(seconds: float) -> str:
    """Formats a time, as in 1.50 ms."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.2f} {unit}"
    return f"{seconds * 1e6:,.1f} us"


def _mesh(row: dict[str, Any]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in row["mesh"].items() if size > 1) or "one device"


def flags(row: dict[str, Any]) -> str:
    """The experiment's flags that reproduce this plan."""
    mesh = " ".join(f"--config.mesh.{axis}={size}" for axis, size in row["mesh"].items())
    return f"{mesh} --config.microbatch_size={row['microbatch_size']}"


def first_line(experiment: str, workload: Workload, count: int) -> str:
    """Announces what is compiled."""
    programs = "the train step" if count == 1 else f"{count} train steps"
    return (
        f"{experiment}: {workload.dataset.name} ({workload.num_examples:,} train); compiling {programs} ahead of time"
    )


def table_head(*, costs: bool) -> str:
    """The header of the Markdown table; the hours and the cost are those of the whole training."""
    names = [*_HEAD.split("|"), *(["cost"] if costs else [])]
    return f"| {' | '.join(names)} |\n| {' | '.join('---' for _ in names)} |"


def table_row(row: dict[str, Any], *, costs: bool) -> str:
    """A plan as a row of the Markdown table."""
    gib = f"{row['bytes_per_chip'] / 2**30:,.2f}" + ("" if row["fits"] else ": too large")
    cells = [row["topology"], _mesh(row), f"{row['batch_size']:,}", f"{row['microbatch_size'] or '-'}", gib]
    if row["step_seconds"] is None:
        return f"| {' | '.join([*cells, *['-'] * (7 + costs)])} |"
    cells += [f"{row[f'{term}_seconds'] * 1e3:,.3f}" for term in ("compute", "memory", "interconnect", "step")]
    efficiency = row["scaling_efficiency"]
    cells += [f"{row['examples_per_second']:,.0f}", "-" if efficiency is None else f"{efficiency:.3f}"]
    hours = row["training_seconds"] / 3600
    cells += [f"{hours:,.2f}" if hours >= 0.1 else f"{hours:.2g}", *([f"{row['training_cost']:,.2f}"] if costs else [])]
    return f"| {' | '.join(cells)} |"


def cost(row: dict[str, Any], prices: Mapping[str, float]) -> dict[str, float]:
    """The estimated cost of an epoch and of the training; {} without prices."""
    if not prices or row["epoch_seconds"] is None:
        return {}
    price = prices[row["chip"]]
    epoch, training = (row[f"{span}_seconds"] / 3600 * row["num_chips"] * price for span in ("epoch", "training"))
    return {"price_per_chip_hour": price, "epoch_cost": epoch, "training_cost": training}


def host(row: dict[str, Any], decoded_per_vcpu: int) -> dict[str, float]:
    """How many images per second the host of a chip must decode for it, and how many it can."""
    if row["examples_per_second"] is None:
        return {}
    vcpus = CHIPS[row["chip"]].vcpus
    return {
        "host_vcpus_per_chip": vcpus,
        "images_per_second_per_chip": row["examples_per_second"] / row["num_chips"],
        "decoded_per_second_per_chip": vcpus * decoded_per_vcpu,
    }


def input_line(row: dict[str, Any]) -> str:
    """Compares the images that a chip consumes with those that its host decodes."""
    needed, decoded = row["images_per_second_per_chip"], row["decoded_per_second_per_chip"]
    verdict = "enough"
    if needed > decoded:
        verdict = f"too few, the chips would wait: {needed / decoded:.1f} times as long; research.data.resize may help"
    return (
        f"{row['topology']}: a chip consumes {needed:,.0f} images/s; its {row['host_vcpus_per_chip']} vCPUs decode "
        f"about {decoded:,.0f}: {verdict}"
    )


def too_large(row: dict[str, Any]) -> str:
    """One line for a plan that does not fit: the memory that it needs, and remedies."""
    needed = f"{bytes_text(row['bytes_per_chip'])} of memory" if row["bytes_per_chip"] else "more memory"
    return (
        f"the train step needs {needed} on each chip of {row['topology']}, which has "
        f"{bytes_text(row['chip_memory_bytes'])}: try a smaller --config.microbatch_size, "
        "--config.mesh.fsdp above 1, or a smaller --config.batch_size"
    )


def report(row: dict[str, Any]) -> str:
    """A plan in detail: facts from the compiled program, then estimates."""
    return "\n".join([*_facts(row), *_estimates(row)])


def _facts(row: dict[str, Any]) -> list[str]:
    chips = row["num_chips"]
    spare = row["chip_memory_bytes"] - row["bytes_per_chip"]
    stand_in = ", for CPU devices that stand in for the GPUs" if row["compiler"].startswith("XLA:CPU") else ""
    lines = [
        f"{row['topology']}: {chips:,} chips, {_mesh(row)}, batch {row['batch_size']:,}",
        f"from the program compiled by {row['compiler']} in {row['compile_seconds']:.1f} s{stand_in}:",
        f"  parameters       {row['num_params']:,}: {bytes_text(row['parameter_bytes_per_chip'])} per chip",
        f"  optimizer state  {bytes_text(row['optimizer_bytes_per_chip'])} per chip",
        f"  peak memory      {bytes_text(row['bytes_per_chip'])} of {bytes_text(row['chip_memory_bytes'])} per chip, "
        f"data included: fits, {bytes_text(spare)} free",
        f"  FLOPs per step   {count_text(row['flops_per_chip'])}FLOP per chip, "
        f"{count_text(row['flops_per_chip'] * chips)}FLOP in total",
        f"  bytes per step   {bytes_text(row['bytes_accessed_per_chip'])} per chip, "
        f"{bytes_text(row['bytes_accessed_per_chip'] * chips)} in total",
    ]
    for found in row["collectives"] or [None]:
        text = "none"
        if found:
            times = f", {found['count']:,} times" if found["count"] > 1 else ""
            over = f"{found['axis']} ({found['devices']:,})"
            text = f"{found['kind']} of {bytes_text(found['bytes'])} over {over}{times}"
        lines.append(f"  collective       {text}")
    return lines


def _estimates(row: dict[str, Any]) -> list[str]:
    efficiency = row["scaling_efficiency"]
    known = (
        "unknown: one chip cannot hold its share"
        if efficiency is None
        else f"{efficiency:.3f} of linear scaling from one chip"
    )
    lines = [
        f"estimated, not measured, from the published specifications ({row['chip_source']}), without overlap:",
        f"  compute          {_seconds(row['compute_seconds'])}",
        f"  memory           {_seconds(row['memory_seconds'])} if all arrays are in HBM",
        f"  interconnect     {_seconds(row['interconnect_seconds'])}",
        f"  step             {_seconds(row['step_seconds'])}: {row['examples_per_second']:,.0f} examples/s, "
        f"{_seconds(row['epoch_seconds'])} per epoch, {_seconds(row['training_seconds'])} for the training",
        f"  efficiency       {known}",
    ]
    if "host_vcpus_per_chip" in row:
        lines.append(f"  input            {input_line(row).partition(': ')[2]}")
    if "epoch_cost" in row:
        lines.append(
            f"  cost             {row['epoch_cost']:,.4f} per epoch, {row['training_cost']:,.2f} for the training, at "
            f"{row['price_per_chip_hour']} per chip-hour"
        )
    return lines
