"""Reads the collectives and the cost of one train step from the HLO text of a compiled program.

XLA's own cost analysis counts the body of a loop once, whatever its trip count; here every iteration counts. The
program of `Steps.train_steps` is a loop over steps whose trip count is an argument: its body is the step. Work outside
of this loop is not part of a step.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

from research.trace import COLLECTIVES

_COLLECTIVE = re.compile(rf" = (.*?) ({COLLECTIVES})(-start)?\(")
_CUDNN = re.compile(
    r" = \((\S+),.*? custom-call\((.*?)\),.* dim_labels=\w+?_(\w+)->.*\"__cudnn\$conv(?:BiasActivation)?(\w+)\""
)
_CUBLAS = re.compile(
    r" = \(?(\S+?\]).*? custom-call\((.*?)\),.*\"__cublas\$.*?\"lhs_contracting_dimensions\":\[([\d\",]*)\]"
)
_BETWEEN_SLICES = re.compile(
    r" = \((.*?), u32.* send\(.*_xla_megascale_target=\"\{([\d:,]+)\}.*_xla_megascale_transfer_type=\"(\w+)\""
)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: XLA's name, "all-reduce" and so on.
      bytes: size of the whole array that is reduced, gathered or scattered; for a permute, the bytes that each device
        sends; between slices, each device's part of the array.
      group: the first of its device groups, as indices in the mesh; () between slices.
      count: how many times a step executes it.
      slices: the number of TPU slices that it spans, through their hosts; 0: it stays within a slice.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    count: int
    slices: int = 0


class Program:
    """A compiled program, and the train step in it.

    Args:
      text: the optimized HLO, from `compiled.as_text()`.
    """

    def __init__(self, text: str):
        self._text = text
        self._bodies: dict[str, list[str]] = {}
        self._costs: dict[str, dict[str, float]] = {}
        self._entry = ""
        name = ""
        for line in text.splitlines():
            header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if header:
                name = header[2]
                self._bodies[name] = []
                self._entry = name if header[1] else self._entry
            elif name:
                self._bodies[name].append(line)
        partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
        self._num_devices = int(partitions[1]) if partitions else 1
        self._root = self._step()
        self._executions = self._count_executions()

    def _loops(self) -> Iterator[tuple[str, str, int | None]]:
        """(enclosing computation, body, trip count) of each loop; a trip count of None is an argument."""
        for name, lines in self._bodies.items():
            for line in lines:
                body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
                if body:
                    yield name, body[1], self._trips(line)

    def _step(self) -> str:
        """The computation of one step: the body of the loop whose trip count is an argument, or else the entry."""
        # The outermost such loop comes last. Loops inside it, as in random number generation, come before.
        return [self._entry, *(body for _, body, trips in self._loops() if trips is None)][-1]

    def _calls(self, name: str) -> Iterator[tuple[str, int]]:
        """(computation, times) that one execution of a computation calls."""
        for line in self._bodies[name]:
            if re.search(r"-(done|update)\(", line):
                continue  # its -start has been counted
            times = (self._trips(line) or 1) if " while(" in line else 1
            for single, branches in _CALLED.findall(line):
                for called in [single] if single else re.findall(r"[\w.\-]+", branches):
                    yield called, times

    def _trips(self, line: str) -> int | None:
        """A loop's trip count: as annotated by the compiler, else the constant in its condition; None: an argument."""
        annotated = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if annotated:
            return int(annotated[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        lines = self._bodies[condition[1]] if condition else []
        constants = [int(n) for line in lines for n in re.findall(r" = [su]\d+\[\]\S* constant\((\d+)\)", line)]
        return max(constants, default=None)

    def _count_executions(self) -> collections.Counter[str]:
        """Counts how often each computation is executed in a step."""
        executions = collections.Counter({self._root: 1})
        # In HLO text a computation comes before its callers, so this order visits callers first.
        for name in reversed(self._bodies):
            for called, times in self._calls(name):
                executions[called] += executions[name] * times
        return executions

    def cost(self) -> dict[str, float]:
        """{"flops", "bytes accessed"} of one step on one device: XLA's cost analysis, every iteration counted."""
        total = {key: value + self._library_cost[key] for key, value in self._analyze(self._root).items()}
        for name, body, trips in self._loops():
            if more := self._executions[name] * ((trips or 1) - 1):
                total = {key: value + more * self._analyze(body)[key] for key, value in total.items()}
        return total

    @functools.cached_property
    def _library_cost(self) -> dict[str, float]:
        """The cost of calls to cuDNN and cuBLAS, which XLA's analysis ignores."""
        flops = moved = 0.0
        for name, lines in self._bodies.items():
            defined = [re.match(r"\s*(?:ROOT )?%?(\S+) = (\S+)", line) for line in lines]
            shapes = {found[1]: found[2] for found in defined if found}
            for line in lines:
                found = _CUDNN.search(line) or _CUBLAS.search(line)
                if found:
                    arrays = [found[1], *(shapes[one] for one in re.findall(r"%([\w.\-]+)", found[2]))]
                    work = _convolution if found.re is _CUDNN else _product
                    flops += self._executions[name] * work(arrays, *found.groups()[2:])
                    moved += self._executions[name] * sum(_bytes(one, "", started=False) for one in arrays)
        return {"flops": flops, "bytes accessed": moved}

    def _analyze(self, name: str) -> dict[str, float]:
        """XLA's cost analysis of one computation, as if it were the entry."""
        if name in self._costs:
            return self._costs[name]
        import jax
        from jaxlib import _hlo, _jax  # pyright: ignore[reportAttributeAccessIssue]

        text = (
            "HloModule one\n" + self._text.partition("\n")[2]
        )  # without the first line, which has the old entry's layout
        text = text.replace("\nENTRY %", "\n%").replace(f"\n%{name} (", f"\nENTRY %{name} (")
        module = _hlo.hlo_module_from_text(text)
        found = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
        self._costs[name] = {key: float(found.get(key, 0.0)) for key in ("flops", "bytes accessed")}
        return self._costs[name]

    def collectives(self) -> list[Collective]:
        """The collectives of a step, largest first; equal ones are merged."""
        counts: collections.Counter[tuple[str, int, tuple[int, ...], int]] = collections.Counter()
        chains = set()
        for name, lines in self._bodies.items():
            for line in lines:
                if not self._executions[name]:
                    continue
                between = _BETWEEN_SLICES.search(line)
                if between:
                    size = _bytes(between[1], "send", started=False)
                    counts[between[3].lower().replace("_", "-"), size, (), _length(between[2])] += self._executions[
                        name
                    ]
                found = _COLLECTIVE.search(line)
                if not found:
                    continue
                # libtpu splits a collective over several fusions, each of which lists it.
                chain = re.search(r'chain_id="(\d+)"', line)
                if chain and (chain[1], found[2]) in chains:
                    continue
                chains |= {(chain[1], found[2])} if chain else set()
                group = _group(line) or tuple(range(self._num_devices))
                if len(group) == 1:
                    continue
                kind, size = found[2], _bytes(found[1], found[2], started=bool(found[3]))
                if kind == "reduce-scatter":
                    size *= len(group)
                if name.startswith("all-reduce-scatter"):  # libtpu's form of a reduce-scatter
                    kind = "reduce-scatter"
                counts[kind, size, group, 0] += self._executions[name]
        rows = [Collective(kind, size, group, n, slices) for (kind, size, group, slices), n in counts.items()]
        return sorted(rows, key=lambda row: -row.bytes * row.count)


def _convolution(arrays: list[str], labels: str, kind: str) -> float:
    """FLOPs of a cuDNN convolution, from its result and operands, the kernel's axis labels, and its direction."""
    output, kernel = {"Forward": (0, 2), "BackwardInput": (1, 2), "BackwardFilter": (2, 0)}[kind]
    features = _dims(arrays[kernel])[labels.index("o")]
    return 2 * math.prod(_dims(arrays[output])) * math.prod(_dims(arrays[kernel])) / features


def _product(arrays: list[str], contracted: str) -> float:
    """FLOPs of a cuBLAS product, from its result and operands, and the contracted axes of the first."""
    sides = _dims(arrays[1])
    return 2 * math.prod(_dims(arrays[0])) * math.prod(sides[int(axis)] for axis in re.findall(r"\d+", contracted))


def _bytes(shapes: str, kind: str, *, started: bool) -> int:
    """Size of a collective's result; the tuple of a -start operation also contains its operands and some flags."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * int(bits or 8) // 8
        for _, bits, dims in _SHAPE.findall(shapes)
    ]
    if started and kind == "collective-permute":
        return sizes[1]
    if started and kind != "all-reduce":
        sizes = sizes[len(sizes) // 2 :]
    return sum(sizes)


def _dims(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",")] if found and found[1] else []


def _length(numbers: str) -> int:
    """The length of a list of numbers and ranges, as in 1,2 or 1:4."""
    ends = [list(map(int, part.split(":"))) for part in numbers.split(",")]
    return sum(part[-1] - part[0] + 1 for part in ends)


def _group(line: str) -> tuple[int, ...]:
    """The first device group, in any of HLO's notations; () means all devices."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}(?:,\{(\d+),(\d+)\})?", line)
    if pairs:
        numbers = [int(n) for n in re.findall(r"\d+", re.search(r"source_target_pairs=\{(.*?)\}\}", line)[1])]  # pyright: ignore[reportOptionalSubscript]
        sent = next(((a, b) for a, b in zip(numbers[::2], numbers[1::2]) if a != b), (0,))
        return tuple(sent)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        groups, reshaped = (list(map(int, part.split(","))) for part in (iota[1], iota[2]))
        order = list(map(int, iota[3].split(","))) if iota[3] else range(len(reshaped))
        numbers = np.arange(math.prod(reshaped)).reshape(reshaped).transpose(order).reshape(groups)
        return tuple(numbers[0].tolist())
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", line)
    return _named_group(named) if named else ()


def _named_group(found: re.Match[str]) -> tuple[int, ...]:
    """The first group along mesh axes, in HLO's notation 'axis' or, for a part of an axis, 'axis':(before)size."""
    axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    numbers = np.arange(math.prod(axes.values()))
    if found[2]:
        order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", found[2])
        assert order
        shape = list(map(int, order[1].split(",")))
        turned = list(map(int, order[2].split(","))) if order[2] else range(len(shape))
        numbers = numbers.reshape(shape).transpose(turned)
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in axes}
    for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[3]):
        parts[name].append((int(before or 1), int(size or axes[name])))
    shape, kept = [], []
    for name, size in axes.items():
        done = 1
        for before, part in sorted(parts[name]):
            shape += [before // done, part]
            kept += [False, True]
            done = before * part
        shape.append(size // done)
        kept.append(False)
    first = numbers.reshape(shape)[tuple(slice(None) if keep else 0 for keep in kept)]
    return tuple(first.reshape(-1).tolist())


def axes_of(group: tuple[int, ...], shape: dict[str, int]) -> str:
    """The mesh axes along which the devices of a group differ, as in "data" or "data+fsdp"."""
    places = np.array(np.unravel_index(np.array(group), tuple(shape.values())))
    return "+".join(name for name, row in zip(shape, places) if len(set(row.tolist())) > 1)
