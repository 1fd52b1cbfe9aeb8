"""Jits the train step and the evaluation step: their shardings, and which buffers they donate."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from research import sharding
from research.training.state import TrainState


def jit_update(
    function: Callable[..., Any], state: TrainState, mesh: Mesh, compiler_options: dict[str, Any] | None = None
) -> Any:
    """Jits (state, data, batches [k, m, b, ...], int32 scalar, hparams) -> (state, replicated arrays).

    The state keeps its shardings, and its buffers are donated.
    """
    replicated = sharding.replicated(mesh)
    state_shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        function,
        in_shardings=(state_shardings, replicated, sharding.batch_sharding(mesh, 2), replicated, replicated),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
        compiler_options=compiler_options,
    )


def jit_eval(function: Callable[..., Any], state: TrainState, mesh: Mesh) -> Any:
    """Jits (params, model_state, carry [b, ...], data, batches [k, b, ...]) -> (carry, replicated arrays, [k, b])."""
    replicated, batch = sharding.replicated(mesh), sharding.batch_sharding(mesh, 0)
    shardings = jax.tree.map(lambda x: x.sharding, (state.eval_params, state.eval_model_state))
    return jax.jit(
        function,
        in_shardings=(*shardings, batch, replicated, sharding.batch_sharding(mesh, 1)),
        out_shardings=(batch, replicated, sharding.batch_sharding(mesh, 1)),
    )
