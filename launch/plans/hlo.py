"""What a step of a compiled program does, read from its HLO text: collectives, and costs with the loops counted.

XLA's own cost analysis counts a loop's body once, whatever its number of turns. The program of `Steps.train_steps` is a
loop over steps whose number is an input: its body is the step, and what is done once before it is no part of it.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf" = (.*?) ({_KINDS})(-start)?\(")
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
    """An exchange between devices.

    Attributes:
      kind: as XLA calls it, "all-reduce" and so on.
      bytes: of the whole array that is reduced, gathered or scattered; of a permute what each device sends; between
        slices what each device has of the array there.
      group: the first of the groups of devices that exchange, by their number in the mesh; () between slices.
      count: how often a step does it.
      slices: between how many slices of TPUs, through their hosts; 0: it is within them.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    count: int
    slices: int = 0


class Program:
    """A compiled program, and the step that it repeats.

    Args:
      text: its optimised HLO, as `compiled.as_text()` gives it.
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
        self._turns = self._count_turns()

    def _loops(self) -> Iterator[tuple[str, str, int | None]]:
        """(computation it is in, its body, its turns) of each loop."""
        for name, lines in self._bodies.items():
            for line in lines:
                body = re.search(r" while\(.*body=%?([\w.\-]+)", line)
                if body:
                    yield name, body[1], self._trips(line)

    def _step(self) -> str:
        """The computation that is one step: the body of the loop whose turns are an input, or the program."""
        # The outermost comes last; there may be others within it, as in drawing random numbers.
        return [self._entry, *(body for _, body, trips in self._loops() if trips is None)][-1]

    def _calls(self, name: str) -> Iterator[tuple[str, int]]:
        """(computation, times) that a computation calls at each of its own turns."""
        for line in self._bodies[name]:
            if re.search(r"-(done|update)\(", line):
                continue  # of what its -start has called
            times = (self._trips(line) or 1) if " while(" in line else 1
            for one, several in _CALLED.findall(line):
                for called in [one] if one else re.findall(r"[\w.\-]+", several):
                    yield called, times

    def _trips(self, line: str) -> int | None:
        """Turns of a loop: as the compiler notes them, else the constant that its condition has; None: an input."""
        noted = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if noted:
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        lines = self._bodies[condition[1]] if condition else []
        constants = [int(n) for line in lines for n in re.findall(r" = [su]\d+\[\]\S* constant\((\d+)\)", line)]
        return max(constants, default=None)

    def _count_turns(self) -> collections.Counter[str]:
        """How often each computation runs in a step."""
        turns = collections.Counter({self._root: 1})
        # HLO text has what is called before what calls it.
        for name in reversed(self._bodies):
            for called, times in self._calls(name):
                turns[called] += turns[name] * times
        return turns

    def cost(self) -> dict[str, float]:
        """{"flops", "bytes accessed"} of a step of one device, by XLA's analysis, each turn of each loop counted."""
        total = {key: value + self._library[key] for key, value in self._analysed(self._root).items()}
        for name, body, trips in self._loops():
            if more := self._turns[name] * ((trips or 1) - 1):
                total = {key: value + more * self._analysed(body)[key] for key, value in total.items()}
        return total

    @functools.cached_property
    def _library(self) -> dict[str, float]:
        """What the convolutions and products that XLA:GPU leaves to cuDNN and cuBLAS cost: its analysis passes over."""
        flops = moved = 0.0
        for name, lines in self._bodies.items():
            defined = [re.match(r"\s*(?:ROOT )?%?(\S+) = (\S+)", line) for line in lines]
            shapes = {found[1]: found[2] for found in defined if found}
            for line in lines:
                found = _CUDNN.search(line) or _CUBLAS.search(line)
                if found:
                    arrays = [found[1], *(shapes[one] for one in re.findall(r"%([\w.\-]+)", found[2]))]
                    work = _convolution if found.re is _CUDNN else _product
                    flops += self._turns[name] * work(arrays, *found.groups()[2:])
                    moved += self._turns[name] * sum(_bytes(one, "", started=False) for one in arrays)
        return {"flops": flops, "bytes accessed": moved}

    def _analysed(self, name: str) -> dict[str, float]:
        """XLA's analysis of one computation, as if it were the whole program."""
        if name in self._costs:
            return self._costs[name]
        import jax
        from jaxlib import _hlo, _jax  # pyright: ignore[reportAttributeAccessIssue]

        text = "HloModule one\n" + self._text.partition("\n")[2]  # the first line has the entry's layout
        text = text.replace("\nENTRY %", "\n%").replace(f"\n%{name} (", f"\nENTRY %{name} (")
        module = _hlo.hlo_module_from_text(text)
        found = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)
        self._costs[name] = {key: float(found.get(key, 0.0)) for key in ("flops", "bytes accessed")}
        return self._costs[name]

    def collectives(self) -> list[Collective]:
        """Those of a step, the largest first; equal ones are one entry."""
        counts: collections.Counter[tuple[str, int, tuple[int, ...], int]] = collections.Counter()
        chains = set()
        for name, lines in self._bodies.items():
            for line in lines:
                if not self._turns[name]:
                    continue
                between = _BETWEEN_SLICES.search(line)
                if between:
                    size = _bytes(between[1], "send", started=False)
                    counts[between[3].lower().replace("_", "-"), size, (), _length(between[2])] += self._turns[name]
                found = _COLLECTIVE.search(line)
                if not found:
                    continue
                # libtpu spreads one over several fusions, each of which has it.
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
                if name.startswith("all-reduce-scatter"):  # what libtpu makes a reduce-scatter of
                    kind = "reduce-scatter"
                counts[kind, size, group, 0] += self._turns[name]
        rows = [Collective(kind, size, group, n, slices) for (kind, size, group, slices), n in counts.items()]
        return sorted(rows, key=lambda row: -row.bytes * row.count)


def _convolution(arrays: list[str], labels: str, kind: str) -> float:
    """Operations of a convolution of cuDNN: its result and operands, the kernel's axes, which of its gradients."""
    output, kernel = {"Forward": (0, 2), "BackwardInput": (1, 2), "BackwardFilter": (2, 0)}[kind]
    features = _dims(arrays[kernel])[labels.index("o")]
    return 2 * math.prod(_dims(arrays[output])) * math.prod(_dims(arrays[kernel])) / features


def _product(arrays: list[str], contracted: str) -> float:
    """Operations of a product of cuBLAS: its result and operands, the axes of the first that it sums over."""
    sides = _dims(arrays[1])
    return 2 * math.prod(_dims(arrays[0])) * math.prod(sides[int(axis)] for axis in re.findall(r"\d+", contracted))


def _bytes(shapes: str, kind: str, *, started: bool) -> int:
    """Of a collective's result; where it is started it has its operands, and some flags, beside its results."""
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
    """How many numbers there are in a list of numbers and ranges, as in 1,2 or 1:4."""
    ends = [list(map(int, part.split(":"))) for part in numbers.split(",")]
    return sum(part[-1] - part[0] + 1 for part in ends)


def _group(line: str) -> tuple[int, ...]:
    """The first group of devices, in any of the ways that HLO writes groups; () for all devices."""
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
    """The first group along some axes of a mesh, each whole or in part: 'a', or 'a':(before)size."""
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
