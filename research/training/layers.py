"""The layers of a network, with the output shapes, parameters and FLOPs of a microbatch's forward pass in training.

`flax.nnx.tabulate` shows what is called by `__call__` of a network, counts one iteration of a `lax.scan`, and fails on
batches with an empty field; here a layer's FLOPs are all products within its scope (`research.flops`).
"""

import collections
import dataclasses
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
from flax import nnx

from research import flops, randomness
from research.data.batch import Batch
from research.network import merge_network
from research.randomness import Stream
from research.training.run import Training


class Layer(NamedTuple):
    """A module of the network.

    Attributes:
      path: of the module; "3-5" in it stands for equal elements of a list; "" is the network.
      kind: its class.
      output: shapes of the arrays that its first call returns; "" if it is not called.
      num_params: the number of scalars in its parameters, those of modules in it included.
      flops: of matrix products and convolutions, for one example; NaN if they cannot be counted.
    """

    path: str
    kind: str
    output: str
    num_params: int
    flops: float


def layers(run: Training) -> list[Layer]:
    """Returns the network, and the modules in it that have parameters or FLOPs, in the order of their calls."""
    modules: dict[str, nnx.Module] = {}
    outputs: dict[str, str] = {}

    def forward(state: Any, data: Any, batches: Batch) -> Any:
        network = merge_network(run.graphdef, state.params, state.model_state)
        modules.update(("/".join(map(str, path)), module) for path, module in nnx.iter_modules(network))
        for path, module in modules.items():
            if path and callable(module):
                module.__class__ = _recorded(type(module), path, outputs)
        batch = jax.tree.map(lambda x: x[0, 0], batches).gather(data)
        carry = jax.tree.map(lambda x: x[0], state.carry)
        arguments = network, dataclasses.replace(batch, step=state.step), carry
        return run.task.advance(*arguments, key=randomness.key(Stream.STEP), train=True)

    traced = jax.make_jaxpr(forward)(*run.train_arguments[:3])
    totals: dict[str, float] = collections.defaultdict(float)
    for product in flops.products(traced):
        for path in _enclosing(product.scope):
            totals[path] += product.flops / run.config.examples_at_once
    return _Tree(modules, outputs, totals).layers("")


def _recorded(cls: Any, path: str, outputs: dict[str, str]) -> type:
    """Returns a subclass whose calls record the shapes of their first output, and have a scope of this path."""

    def call(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
        is_first = path not in outputs
        outputs.setdefault(path, "")  # before the modules in it, so that all are in the order of their calls
        with jax.named_scope(f"<{path}>"):
            output = cls.__call__(self, *args, **kwargs)
        if is_first:
            outputs[path] = " ".join(str(list(x.shape)) for x in jax.tree.leaves(output) if isinstance(x, jax.Array))
        return output

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _enclosing(scope: str) -> list[str]:
    """Returns the path of the module that a scope is in, and the paths around it."""
    innermost = ["", *re.findall(r"<([^<>]*)>", scope)][-1]
    return ["", *itertools.accumulate(innermost.split("/"), "{}/{}".format)] if innermost else [""]


class _Tree:
    """The modules of a network by path, with their outputs and FLOPs."""

    def __init__(self, modules: dict[str, Any], outputs: dict[str, str], totals: dict[str, float]):
        self._modules, self._outputs, self._totals = modules, outputs, totals
        self._children: dict[str, list[str]] = {path: [] for path in modules}
        for path in filter(None, modules):
            parent = next(outer for outer in reversed(_enclosing(f"<{path}>")[:-1]) if outer in modules)
            self._children[parent].append(path)

    def layers(self, path: str) -> list[Layer]:
        """Returns a module and those in it, with paths relative to this one."""
        module, inner = self._modules[path], self._inner(path)
        if isinstance(module, nnx.List):
            return inner
        num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module, nnx.Param)))
        own = Layer("", type(module).__name__, self._outputs.get(path, ""), num_params, self._totals[path])
        if not (own.num_params or own.flops):
            return []
        # What only wraps another module, such as a choice of norms, is shown without it.
        return [own] if len(inner) == 1 and inner[0][2:] == own[2:] else [own, *inner]

    def _inner(self, path: str) -> list[Layer]:
        """Returns the layers in a module; of equal elements of a list that follow each other, those of the first."""
        parts = [(child[len(path) :].lstrip("/"), self.layers(child)) for child in self._in_order(path)]
        if isinstance(self._modules[path], nnx.List):
            groups = [list(group) for _, group in itertools.groupby(parts, key=lambda part: part[1])]
            parts = [("-".join(dict.fromkeys((group[0][0], group[-1][0]))), group[0][1]) for group in groups]
        return [layer._replace(path=f"{name}/{layer.path}".rstrip("/")) for name, found in parts for layer in found]

    def _in_order(self, path: str) -> list[str]:
        """Returns the modules directly in this one: first those that are not called, then in the order of calls."""
        called = list(self._outputs)

        def place(child: str) -> int:
            return next((i for i, other in enumerate(called) if f"{other}/".startswith(f"{child}/")), -1)

        return sorted(self._children[path], key=place)
