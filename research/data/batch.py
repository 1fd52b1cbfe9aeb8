"""Defines a batch: features of examples, and separate from them the numbers that the pipeline adds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of examples: `batch["image"]` is a feature of the data set, `batch.index` is the pipeline's.

    In a train step and in an evaluation, the arrays are those of one (micro)batch, [b, ...]. On their way there they
    have more leading axes (`research.data.pipeline`), and lack the features of a device-resident data set.

    Attributes:
      features: by name, [b, ...] each.
      index: int32 [b], the examples' numbers in their split.
      epoch: int32 [b], the examples' epochs; None in evaluation.
      step: int32 scalar, the number of updates so far; None in evaluation.
      mask: float32 [b], 0 for padding; None in training.
    """

    features: dict[str, Any]
    index: Any
    epoch: Any = None
    step: Any = None
    mask: Any = None

    def __getitem__(self, feature: str) -> Any:
        return self.features[feature]

    def gather(self, data: Mapping[str, Any]) -> "Batch":
        """Adds the examples `index` of arrays [n, ...] as features."""
        gathered = {name: array[self.index] for name, array in data.items()}
        return dataclasses.replace(self, features=self.features | gathered)
