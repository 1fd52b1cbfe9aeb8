"""The functions that `launch.predict` calls, with the inputs and outputs that it expects of them."""

from collections.abc import Iterable, Mapping
from typing import Any

from launch.artifacts import tokens

# For each function the (inputs, outputs), each with its shape and a prefix of its dtype's name. Sizes: "b" is the batch
# size, "classes" the number of classes in the manifest, 0 any size.
_IMAGE = ("b", 0, 0, 0)
_SIGNATURES: dict[str, tuple[dict[str, tuple[tuple, str]], dict[str, tuple[tuple, str]]]] = {
    "classify": ({"image": (_IMAGE, "uint8")}, {"logits": (("b", "classes"), "float")}),
    "step": ({"token": (("b",), "int32")}, {"logits": (("b", "classes"), "float")}),
    "encode": ({"image": (_IMAGE, "uint8"), "index": (("b",), "int32")}, {"mean": (("b", 0), "float32")}),
    "decode": ({"latents": (("b", 0), "float32")}, {"image": (_IMAGE, "float")}),
    "sample": ({"seed": ((), "uint32"), "index": (("b",), "int32")}, {"image": (_IMAGE, "float")}),
}


def check(manifest: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises `ValueError` if a function does not have the signature that `launch.predict` expects.

    Args:
      manifest: an artifact's manifest.
      names: the functions to check.
    """
    functions = {name: manifest["functions"][name] for name in names}
    for name, function in functions.items():
        inputs, outputs = _SIGNATURES[name]
        if name == "step":  # its other inputs are the recurrent state, which it must return with the same shapes
            state = {n: x for n, x in function["inputs"].items() if n not in inputs}
            if any(function["outputs"].get(n) != x or x["shape"][:1] != ["b"] for n, x in state.items()):
                raise ValueError("step does not return its state with the shapes of its inputs")
            tokens.check(manifest)
        elif function["inputs"].keys() != inputs.keys():
            raise ValueError(f"{name} takes {', '.join(function['inputs'])}, not {', '.join(inputs)}")
        for kind, expected in (("inputs", inputs), ("outputs", outputs)):
            for part, (shape, dtype) in expected.items():
                has = function[kind].get(part, {"shape": None, "dtype": "nothing"})
                if not _fits(has, shape, dtype, len(manifest["classes"])):
                    raise ValueError(f"{name} has for {part} {has['dtype']} {has['shape']}")
    if "encode" in functions and functions["encode"]["outputs"]["mean"] != functions["decode"]["inputs"]["latents"]:
        raise ValueError("decode does not take what encode returns")


def _fits(has: Mapping[str, Any], shape: tuple, dtype: str, classes: int) -> bool:
    if has["shape"] is None or len(has["shape"]) != len(shape) or not has["dtype"].startswith(dtype):
        return False
    sizes = {"b": "b", "classes": classes}
    return all(n == sizes[s] if s else isinstance(n, int) and n > 0 for n, s in zip(has["shape"], shape))
