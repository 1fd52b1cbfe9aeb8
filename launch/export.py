"""Exports a trained network as an artifact that runs without this repository: StableHLO programs and weights.

python -m launch.export experiments.cifar_cnn --workdir=DIR --out=DIR [flags of the experiment]

`--workdir` is the folder of a run. Its newest checkpoint is exported, or the one that `--checkpoint` names, with the
averaged parameters if training kept an average, as in evaluation. The data set is not needed. `launch.predict` runs the
artifact. The programs are StableHLO for CPUs, CUDA and ROCm GPUs and TPUs, for any batch size. Where a layer of
`research.layers` has a separate CPU form, the program contains both, and the platform selects one when it is compiled
(`jax.lax.platform_dependent`).
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import job as job_lib
from launch.artifacts import artifact
from launch.artifacts.artifact import ArtifactError
from research import app, flags
from research.config import option
from research.data import decoding
from research.errors import RecordError, UserError
from research.paths import open_path

if TYPE_CHECKING:
    from jax.export import Exported

    from research.data.tokenization import Tokenizer
    from research.tasks.task import ExportedFunction
    from research.training.run import Training

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass
class ExportOptions:
    """The flags of `launch.export`."""

    workdir: str = option("", "required: folder of the run to export")
    out: str = option("", "required: folder for the artifact, new or empty")
    checkpoint: str = option("newest", "checkpoint to export: newest, best (lowest validation loss) or a step")


def run(argv: Sequence[str]) -> int:
    """Exports a checkpoint of a run.

    Raises:
      UserError: bad input, or a network that cannot be exported; nothing is written.
      RecordError: the artifact could not be written; nothing is left behind.
    """
    job = job_lib.parse("export", str(__doc__), ExportOptions(), argv)
    out = _out(job)
    if not job.options.workdir:
        raise UserError("give --workdir=DIR, the folder of the run to export")
    if not (open_path(job.workdir) / "config.json").exists():
        raise UserError(f"--workdir={job.workdir} does not hold a run: give the folder of the run to export")
    own = [f"--workdir={job.workdir}", f"--checkpoint={job.options.checkpoint}", "--mode=eval"]
    command = flags.parse(job.experiment, [*job.args, *own])
    mesh = app.start(command.config)
    import jax

    if jax.process_count() > 1:
        raise UserError("launch.export runs in one process: start it without a launcher")
    training = app.restored(job.experiment, command, mesh, with_examples=False)
    manifest, weights, programs = contents(job.experiment.name, training)
    try:
        checksum = artifact.write(out, manifest, weights, programs)
    except OSError as error:
        raise RecordError(f"--out={out} could not be written ({error.strerror}): nothing was left behind") from None
    mebibytes = sum(file.stat().st_size for file in out.iterdir()) / 2**20
    print(
        f"{job.experiment.name}, step {training.progress.step:,}: {', '.join(programs)} for {', '.join(PLATFORMS)}\n"
        f"  artifact: {out} ({mebibytes:.2f} MiB, sha256 {checksum})"
    )
    return 0


def _out(job: job_lib.Job) -> Path:
    for name in ("mode", "reproduce"):
        if name in job.given:
            raise UserError(f"--{name} does not apply to launch.export: leave it out")
    if not job.options.out:
        raise UserError("give --out=DIR, the folder for the artifact")
    if "://" in job.options.out:
        raise UserError(f"--out={job.options.out} is not on this machine: export to a local folder and copy it")
    out = open_path(job.options.out)
    try:
        artifact.check_free(out)
    except ArtifactError as error:
        raise UserError(str(error)) from None
    return out


def contents(experiment: str, training: "Training") -> tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]:
    """The arguments of `artifact.write`: the manifest, the weights by name, and the programs by function.

    Args:
      experiment: the experiment's name.
      training: the training, restored from the checkpoint.

    Raises:
      UserError: the task or the network cannot be exported.
    """
    import jax
    from flax import nnx

    from research.network import merge_network

    state, task, dataset = training.state, training.task, training.dataset
    model = merge_network(training.graphdef, state.eval_params, state.eval_model_state)
    functions = task.functions(model, dataset)
    if not functions:
        raise UserError(f"{experiment} cannot be exported: {type(task).__name__} does not define `functions`")
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        {"params": state.eval_params, "model_state": state.eval_model_state}
    )
    weights = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): jax.device_get(leaf)
        for path, leaf in leaves
    }

    def network(arrays: Mapping[str, Any]) -> nnx.Module:
        tree = jax.tree.unflatten(structure, [arrays[name] for name in weights])
        return merge_network(training.graphdef, tree["params"], tree["model_state"])

    exported = {name: _export(name, function, network, weights) for name, function in functions.items()}
    manifest = _manifest(experiment, training, weights, functions, exported)
    return manifest, weights, {name: bytes(e.serialize()) for name, e in exported.items()}


def _manifest(
    experiment: str,
    training: "Training",
    weights: Mapping[str, Any],
    functions: Mapping[str, "ExportedFunction"],
    exported: Mapping[str, "Exported"],
) -> dict[str, Any]:
    from launch.artifacts.runtimes import described
    from research.training import summary
    from research.training.state import num_params

    dataset = training.config.dataset
    center_crop = dataset.center_crop if dataset.image_size else None
    return {
        "experiment": experiment,
        "dataset": training.dataset.name,
        "step": training.progress.step,
        "num_params": num_params(training.state),
        "results": training.progress.results,
        "config": dataclasses.asdict(training.config),
        # How images of any size become inputs; null: they must have the inputs' size.
        "center_crop": center_crop,
        "classes": list(training.dataset.label_names),
        **_tokenizer(training.dataset.tokenizer),
        "platforms": list(PLATFORMS),
        "functions": {
            name: described(exported[name])
            | {"preprocessing": function.preprocessing, "context": function.context}
            | _image_files(exported[name], center_crop)
            for name, function in functions.items()
        },
        "weights": {name: {"shape": list(x.shape), "dtype": str(x.dtype)} for name, x in weights.items()},
        "versions": summary.versions()
        | {"calling_convention": max(e.calling_convention_version for e in exported.values())},
    }


def _tokenizer(tokenizer: "Tokenizer | None") -> dict[str, Any]:
    """Describes how text becomes tokens, if the data set is a text."""
    return {"tokenizer": {"kind": tokenizer.kind, "json": tokenizer.content}} if tokenizer else {}


def _image_files(exported: "Exported", center_crop: float | None) -> dict[str, Any]:
    """Describes how image files become the function's images, if it takes images."""
    from launch.artifacts.runtimes import described

    image = described(exported)["inputs"].get("image")
    if image is None or image["shape"][-1] not in decoding.MODES:
        return {}
    return {"image_files": decoding.describe(image["shape"][1:], center_crop)}


def _export(name: str, function: "ExportedFunction", network: Any, weights: Mapping[str, Any]) -> "Exported":
    import jax
    from jax import export

    scope = export.SymbolicScope()
    inputs = {
        name: jax.ShapeDtypeStruct(export.symbolic_shape(shape, scope=scope), dtype)
        for name, (shape, dtype) in function.inputs.items()
    }

    def program(weights: Mapping[str, Any], inputs: Any) -> dict[str, Any]:
        return function.call(network(weights), inputs)

    with _without_source_lines(), _for_any_batch_size(name):
        return export.export(jax.jit(program), platforms=PLATFORMS)(
            {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.items()}, inputs
        )


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """A context in which traced programs do not contain source paths, so that they do not depend on the machine."""
    import jax

    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def _for_any_batch_size(name: str) -> Iterator[None]:
    """A context that explains JAX's errors about a symbolic batch size to the author of the network."""
    from jax.errors import InconclusiveDimensionOperation

    try:
        yield
    except (TypeError, InconclusiveDimensionOperation) as error:
        if isinstance(error, TypeError) and "_DimExpr" not in str(error):
            raise
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} cannot be exported for any batch size ({first}): the network must use x.shape[0] instead of "
            "len(x), and must not branch on it"
        ) from error


if __name__ == "__main__":
    job_lib.main(run)
