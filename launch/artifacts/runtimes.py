"""Compiles and runs the programs of an artifact with JAX or IREE: `outputs = runtime(function, inputs)`."""

import os
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend import mlir

from launch.artifacts.artifact import Artifact, ArtifactError

Arrays = dict[str, np.ndarray]


def described(exported: export.Exported) -> dict[str, Any]:
    """Shapes and dtypes of a program's inputs and outputs; the size "b" is the batch size, which may be any."""
    _, inputs = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0]
    outputs = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return {kind: _shapes(avals) for kind, avals in (("inputs", inputs), ("outputs", outputs))}


def _shapes(avals: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {"shape": [d if isinstance(d, int) else str(d) for d in aval.shape], "dtype": str(aval.dtype)}
        for name, aval in avals.items()
    }


def _agrees(exported: export.Exported, function: Mapping[str, Any], manifest: Mapping[str, Any]) -> bool:
    """Returns whether a program has the inputs, outputs, weights and platforms that the manifest lists."""
    listed = {kind: function[kind] for kind in ("inputs", "outputs")}
    weights = jax.tree.unflatten(exported.in_tree, exported.in_avals)[0][0]
    return (described(exported), _shapes(weights)) == (listed, manifest["weights"]) and (
        set(manifest["platforms"]) <= set(exported.platforms)
    )


class Runtime:
    """Base class. Each function is compiled once per batch size; `compile_seconds` is the total.

    Args:
      artifact: the artifact, from `artifact.read`.

    Raises:
      ArtifactError: this version of jax cannot read the programs, or they do not run on this machine's devices.
    """

    name = ""

    def __init__(self, artifact: Artifact):
        try:
            self._exported = {n: export.deserialize(bytearray(p)) for n, p in artifact.programs.items()}
        except Exception as error:  # the parser may raise anything
            versions = artifact.manifest.get("versions")
            raise ArtifactError(
                f"the artifact's programs cannot be read by jax {jax.__version__} ({type(error).__name__}): it was "
                f"written with {versions}; use the same or a newer jax"
            ) from None
        functions = artifact.manifest["functions"]
        for name, exported in self._exported.items():
            if not _agrees(exported, functions[name], artifact.manifest):
                raise ArtifactError(f"the artifact was changed: {name} does not match its manifest; export it again")
        self._weights = artifact.weights
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    def __call__(self, function: str, inputs: Arrays) -> Arrays:
        """Runs a function; returns its outputs by name.

        Args:
          function: the name of a function in the manifest.
          inputs: arrays by name, with the manifest's shapes and dtypes, and one batch size.
        """
        key = function, tuple(sorted((name, x.shape) for name, x in inputs.items()))
        if key not in self._compiled:
            began = time.monotonic()
            try:
                self._compiled[key] = self._compile(self._exported[function], inputs)
            except ArtifactError:
                raise
            except Exception as error:  # compilers raise many types
                reason = " ".join(str(error).split())[:200]
                raise ArtifactError(
                    f"{function} cannot be compiled by {self.name} ({reason}): export it again"
                ) from None
            self.compile_seconds += time.monotonic() - began
        return self._run(self._compiled[key], self._exported[function], inputs)

    def _compile(self, exported: export.Exported, inputs: Arrays) -> Any:
        raise NotImplementedError

    def _run(self, program: Any, exported: export.Exported, inputs: Arrays) -> Arrays:
        raise NotImplementedError


class JaxRuntime(Runtime):
    """Runs on JAX's default device."""

    def __init__(self, artifact: Artifact):
        super().__init__(artifact)
        try:
            platform = jax.default_backend()
        except Exception as error:  # RuntimeError; AssertionError without a text if the platform's plugin is missing
            why = str(error).partition(" (set JAX_PLATFORMS")[0][:200] or "its plugin is not installed"
            raise ArtifactError(
                f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: jax finds no such device ({why}): "
                "set JAX_PLATFORMS=cpu"
            ) from None
        self.name = f"jax on {platform}"
        platforms = {platform} | ({"cuda", "rocm"} if platform == "gpu" else set())
        if not platforms & set(artifact.manifest["platforms"]):
            raise ArtifactError(
                f"the artifact is for {', '.join(artifact.manifest['platforms'])}, but jax runs on {platform} here: "
                "set JAX_PLATFORMS=cpu, or use --runtime=iree"
            )
        self._weights = jax.device_put(artifact.weights)

    def _compile(self, exported: export.Exported, inputs: Arrays) -> Any:
        return jax.jit(exported.call).lower(self._weights, inputs).compile()

    def _run(self, program: Any, exported: export.Exported, inputs: Arrays) -> Arrays:
        return jax.device_get(program(self._weights, inputs))


class IreeRuntime(Runtime):
    """Compiles the same StableHLO with IREE for this machine's CPU, and runs it outside JAX.

    JAX only parses the program and substitutes the batch size, since IREE optimizes loops better with static shapes.
    """

    name = "iree on llvm-cpu"

    def __init__(self, artifact: Artifact):
        super().__init__(artifact)
        try:
            from iree import runtime  # pyright: ignore[reportMissingImports]
            from iree.compiler import tools  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ArtifactError('--runtime=iree needs IREE: pip install "meshwork[iree]"') from None
        self._compiler, self._runtime = tools, runtime
        self._config = runtime.Config("local-task")
        flat = jax.tree.leaves(artifact.weights)  # sorted by name, the order in which the programs take them
        self._flat = [runtime.asdevicearray(self._config.device, x) for x in flat]

    def _compile(self, exported: export.Exported, inputs: Arrays) -> Any:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self._weights, inputs))
        # For the platform "cpu", so that layers with a separate CPU form use it.
        fixed = export.export(jax.jit(exported.call), platforms=["cpu"])(*shapes)
        module = mlir.refine_polymorphic_shapes(fixed.mlir_module().encode(), enable_shardy=True)
        try:
            program = self._compiler.compile_str(
                module,
                input_type="stablehlo",
                target_backends=["llvm-cpu"],
                extra_args=["--iree-llvmcpu-target-cpu=host"],
            )
        except self._compiler.CompilerToolError as error:
            lines = [line for line in str(error).splitlines() if "error:" in line]
            reason = lines[0].partition("error:")[2].strip() if lines else "see iree-compile"
            raise ArtifactError(f"IREE cannot compile this network ({reason}): use --runtime=jax") from None
        loaded = self._runtime.VmModule.copy_buffer(self._config.vm_instance, program)
        return self._runtime.load_vm_module(loaded, self._config)["main"], fixed.module_kept_var_idx

    def _run(self, program: Any, exported: export.Exported, inputs: Arrays) -> Arrays:
        main, kept = program
        arguments = [*self._flat, *jax.tree.leaves(inputs)]
        outputs = main(*(arguments[i] for i in kept))
        leaves = outputs if isinstance(outputs, list | tuple) else [outputs]
        return jax.tree.unflatten(exported.out_tree, [x.to_host() for x in leaves])


RUNTIMES: Mapping[str, type[Runtime]] = {"jax": JaxRuntime, "iree": IreeRuntime}
