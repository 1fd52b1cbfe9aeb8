"""Runs an artifact written by `launch.export`; from `research` it imports only the image decoder.

python -m launch.predict --artifact=DIR image.png folder ...           classifier: the most likely classes of each image
python -m launch.predict --artifact=DIR --top=5 --csv=FILE folder ...  the same as a table
python -m launch.predict --artifact=DIR --prompt="ROMEO:"              language model: a continuation of the prompt
python -m launch.predict --artifact=DIR --out=DIR image.png ...        autoencoder: reconstructions of the images
python -m launch.predict --artifact=DIR --out=DIR --num_samples=16     autoencoder: sampled images

--runtime=iree compiles the same programs with IREE and runs them outside JAX. Predictions go to stdout, the speed to
stderr (of the network alone, without compilation and reading files). All files of the artifact are checked first.
"""

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from launch.artifacts import artifact as artifact_lib
from launch.artifacts import batches, expected_signatures, image_files, probabilities, sampling, tokens
from launch.artifacts.artifact import Artifact, ArtifactError

if TYPE_CHECKING:
    from launch.artifacts.runtimes import Runtime

_DEFAULT_TOP = 3  # classes


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArtifactError(f"{message}; --help lists the options")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the options. Those that were not given are None, so that options that do not apply can be rejected.

    Raises:
      ArtifactError: an option is unknown, or a value is invalid.
      SystemExit: after `--help`.
    """
    parser = _Parser("launch.predict", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.allow_abbrev = False
    images_help = "image files or folders of them, of the network's input size unless it was trained on crops"
    parser.add_argument("images", nargs="*", help=images_help)
    parser.add_argument("--artifact", required=True, type=_path, help="folder written by launch.export")
    parser.add_argument("--runtime", default="jax", choices=("jax", "iree"), help="compiles and runs the programs")
    parser.add_argument("--top", type=_number(int, 1), help="number of most likely classes of an image (default: 3)")
    parser.add_argument("--csv", type=_path, help="new CSV file for the classes of the images, instead of stdout")
    parser.add_argument("--out", type=_path, help="folder for the output images, new or empty")
    parser.add_argument("--prompt", help="text to continue (default: a newline)")
    parser.add_argument("--length", type=_number(int, 1), help="number of tokens to generate (default: 500)")
    parser.add_argument("--num_samples", type=_number(int, 1), help="number of texts (default: 1) or images")
    parser.add_argument("--temperature", type=_number(float, 0), help="divides the logits (default: 0.8); 0: greedy")
    parser.add_argument(
        "--top_p", type=_number(float, 0, 1), help="nucleus sampling, as in `experiments.char_rnn` (default: 1)"
    )
    parser.add_argument("--sample_seed", type=_number(int, 0, 2**32 - 1), help="random seed (default: 0)")
    return parser.parse_args(argv)


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def _number(kind: Any, least: float, most: float = float("inf")) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most or value == float("inf"):
            bounds = f"{least} or more" if most == float("inf") else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of {bounds}")
        return value

    return parsed


def run(argv: Sequence[str]) -> None:
    """Runs the artifact and prints its predictions.

    Raises:
      ArtifactError: bad input, found before anything is compiled or written.
    """
    options = parse(argv)
    artifact = artifact_lib.read(options.artifact)
    functions = artifact.manifest["functions"].keys()
    for needed, applies, predict in _KINDS:
        if needed <= functions:
            _refuse_others(options, applies, ", ".join(sorted(functions)))
            try:
                expected_signatures.check(artifact.manifest, needed)
            except ValueError as error:
                raise ArtifactError(
                    f"--artifact={options.artifact} is inconsistent: {error}; export it again"
                ) from None
            return predict(artifact, options)
    raise ArtifactError(
        f"--artifact={options.artifact} has the functions {', '.join(functions)}, which launch.predict does not "
        "support: call them from Python with launch.artifacts.runtimes"
    )


def _refuse_others(options: argparse.Namespace, applies: Sequence[str], functions: str) -> None:
    for name, value in vars(options).items():
        if name not in ("artifact", "runtime", *applies) and value not in (None, []):
            shown = "images" if name == "images" else f"--{name}"
            raise ArtifactError(
                f"{shown} does not apply to this artifact, whose functions are {functions}; leave it out"
            )


def _runtime(artifact: Artifact, options: argparse.Namespace) -> "Runtime":
    # Imported late, since importing jax takes seconds: bad input is reported before.
    from launch.artifacts.runtimes import RUNTIMES

    return RUNTIMES[options.runtime](artifact)


def _classify(artifact: Artifact, options: argparse.Namespace) -> None:
    if not options.images:
        raise ArtifactError("give images to classify, as in `python -m launch.predict --artifact=DIR image.png`")
    classes = artifact.manifest["classes"]
    top = options.top or min(_DEFAULT_TOP, len(classes))
    if top > len(classes):
        raise ArtifactError(f"--top={top}: the network has {len(classes)} classes; give at most this number")
    images = _images(artifact, options, "classify")
    # Opened before the network runs, so that a file that cannot be written is reported at once.
    with probabilities.new_file(options.csv) if options.csv else contextlib.nullcontext() as file:
        outputs = batches.run(_runtime(artifact, options), "classify", {"image": images}, "images")
        rankings = (ranking for batch in outputs for ranking in probabilities.rank(batch["logits"], classes, top))
        if file:
            table = probabilities.CsvTable(file, top)
            for path, ranking in zip(images.paths, rankings, strict=True):
                table.add(path, ranking)
        else:
            # Not while the network runs: a damaged image ends the command before anything is printed.
            lines = [probabilities.line(*entry) for entry in zip(images.paths, rankings, strict=True)]
            print("\n".join(lines))
    if file:
        print(options.csv)


def _images(artifact: Artifact, options: argparse.Namespace, function: str) -> image_files.ImageFiles:
    shape = artifact.manifest["functions"][function]["inputs"]["image"]["shape"][1:]
    return image_files.ImageFiles(image_files.list_files(options.images), shape, artifact.manifest.get("center_crop"))


def _reconstruct_or_draw(artifact: Artifact, options: argparse.Namespace) -> None:
    if bool(options.images) == bool(options.num_samples):
        raise ArtifactError("give either images to reconstruct, or --num_samples=N to sample images")
    if options.images and options.sample_seed is not None:
        raise ArtifactError("--sample_seed is for --num_samples: reconstruction is deterministic; leave it out")
    if not options.out:
        raise ArtifactError("give --out=DIR, the folder for the images")
    artifact_lib.check_free(options.out)
    if options.images:
        images = _images(artifact, options, "encode")
        numbers = _index(len(images))
        inputs = {"image": images[numbers], "index": numbers}
        _make_folder(options.out)
        runtime = _runtime(artifact, options)
        latents = batches.concatenate(batches.run(runtime, "encode", inputs, "images"), "mean")
        outputs = batches.run(runtime, "decode", {"latents": latents}, "images")
        names = [f"{i:04}-{Path(path).stem}.png" for i, path in enumerate(images.paths)]
    else:
        inputs = {"seed": np.array(options.sample_seed or 0, np.uint32), "index": _index(options.num_samples)}
        _make_folder(options.out)
        outputs = batches.run(_runtime(artifact, options), "sample", inputs, "images")
        names = [f"{i:04}.png" for i in range(options.num_samples)]
    decoded = batches.concatenate(outputs, "image")
    try:
        for name, image in zip(names, decoded):
            image_files.write(options.out / name, image)
            print(options.out / name)
    except OSError as error:
        raise ArtifactError(f"--out={options.out} could not be written: {error.strerror}") from None


def _make_folder(out: Path) -> None:
    """Creates the folder, before the network runs."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"--out={out} cannot be created: {error.strerror}; give another folder") from None


def _index(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.int32)


def _continue_text(artifact: Artifact, options: argparse.Namespace) -> None:
    prompt = tokens.encode(artifact.manifest, options.prompt or "")
    function = artifact.manifest["functions"]["step"]
    context = function.get("context")
    if context and len(prompt) > context:
        raise ArtifactError(f"--prompt has {len(prompt):,} tokens, the network's context {context:,}: shorten it")
    count, length = options.num_samples or 1, options.length or 500
    temperature = 0.8 if options.temperature is None else options.temperature
    top_p = 1.0 if options.top_p is None else options.top_p
    rng = np.random.default_rng(options.sample_seed or 0)
    runtime = _runtime(artifact, options)
    inputs = function["inputs"]
    memory = {name: np.zeros((count, *x["shape"][1:]), x["dtype"]) for name, x in inputs.items() if name != "token"}
    texts, began = [np.full(count, token, np.int32) for token in prompt], time.monotonic()
    for number in range(len(prompt) + length - 1):
        outputs = runtime("step", {"token": texts[number], **memory})
        memory = {name: outputs[name] for name in memory}
        if number >= len(prompt) - 1:
            texts.append(sampling.draw(outputs["logits"], rng, temperature, top_p))
    seconds = time.monotonic() - began - runtime.compile_seconds
    steps = count * (len(prompt) + length - 1)
    batches.report(runtime, f"step: {steps:,}", "tokens", steps, seconds, runtime.compile_seconds)
    for number, row in enumerate(np.stack(texts, 1)):
        print(f"--- sample {number + 1} of {count}")
        print(tokens.decode(artifact.manifest, row))


_KINDS: list[tuple[set[str], tuple[str, ...], Callable[[Artifact, argparse.Namespace], None]]] = [
    ({"classify"}, ("images", "top", "csv"), _classify),
    ({"encode", "decode", "sample"}, ("images", "out", "num_samples", "sample_seed"), _reconstruct_or_draw),
    ({"step"}, ("prompt", "length", "num_samples", "temperature", "top_p", "sample_seed"), _continue_text),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. After bad input it prints one line and exits with code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # class names may have characters that stdout cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except BrokenPipeError:  # stdout was closed, as by `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        sys.exit(130)
    except ArtifactError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
