"""Draws and saves plots safely: Figures of bounded size, literal text, and warnings instead of errors.

matplotlib is slow to import, so functions import it. `Figure` is used instead of pyplot: it needs no display and has no
global state.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from research.process.signals import StoppedError
from research.record import storage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120
_MAX_INCHES = 20.0  # a PNG of 2,400 pixels, 23 MB in memory
_MAX_CHARACTERS = 40

T = TypeVar("T")


def import_matplotlib() -> None:
    """Imports matplotlib; if MPLBACKEND names a backend that is not installed, removes it from the environment.

    Jupyter sets this variable for the commands that it starts. Figures need no backend, but with a missing one the
    import of matplotlib fails, and so does that of `optuna.visualization`, which imports it.
    """
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
            os.environ["MPLBACKEND"] = backend


def figure(width: float, height: float) -> "Figure":
    """Creates an empty Figure of `width` by `height` inches, each at most 20."""
    import_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(min(width, _MAX_INCHES), min(height, _MAX_INCHES)), layout="constrained")


def literal(text: str, max_characters: int = _MAX_CHARACTERS) -> str:
    r"""Escapes `text` so that matplotlib shows it literally; use it for all text from a user or a data set.

    Otherwise two "$" start math mode, a leading "_" hides a line from the legend, a line break changes the layout, and
    a character that the font lacks becomes an empty box and a warning. Such characters become escapes, as in \u72ac.

    Args:
      text: any text.
      max_characters: a longer text is shortened in the middle.
    """
    import_matplotlib()
    from matplotlib import font_manager, rcParams

    families = (font_manager.FontProperties(family=[family]) for family in rcParams["font.family"])
    fonts = [font_manager.get_font(font_manager.findfont(family)) for family in families]

    def shown(character: str) -> str:
        has_glyph = any(font.get_char_index(ord(character)) for font in fonts)
        return character if has_glyph and character.isprintable() else ascii(character)[1:-1]

    text = "".join(map(shown, f" {text}" if text[:1] in ("", "_") else text))
    if len(text) > max_characters:
        half = max_characters // 2
        text = f"{text[: max_characters - half - 1]}…{text[-half:]}"
    return text.replace("$", r"\$")


def png(figure: "Figure") -> bytes:
    """Renders a Figure as PNG."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=_DPI)
    return data.getvalue()


def print_warning(text: str) -> None:
    """Prints a line on stderr."""
    print(f"WARNING: {text}", file=sys.stderr)


def attempt(failure: str, draw: Callable[[], T], warn: Callable[[str], None] = print_warning) -> T | None:
    """Returns the result of `draw`; if it fails, warns with the text `failure` and the reason, and returns None."""
    try:
        return draw()
    except StoppedError:
        raise
    except Exception as error:
        warn(f"{failure}: {error.__cause__ or error}")
        return None


def save(path: Path, draw: Callable[[], "Figure"], warn: Callable[[str], None] = print_warning) -> bytes | None:
    """Draws a plot and saves it as PNG. Any failure is only a warning.

    Args:
      path: the file.
      draw: returns the Figure.
      warn: called with the text of the warning.

    Returns:
      The PNG, or None if it failed.
    """

    def draw_and_write() -> bytes:
        data = png(draw())
        storage.replace(path, data)
        return data

    return attempt(f"{path.name} was not drawn", draw_and_write, warn)
