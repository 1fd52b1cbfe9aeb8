"""Writes TensorBoard events without TensorFlow: `tensorboard --logdir=<workdir>` shows them.

The file is a TFRecord: for each event its length, the length's checksum, the event, and the event's checksum.
"""

import importlib
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from research.record.storage import Log

_NAME = "events.out.tfevents.run"
_CONFIG = "config"


def _tensorboardx(module: str) -> Any:
    """Imports a module of tensorboardX."""
    # tensorboardX imports PyTorch if it is installed, which takes seconds and is of no use here, so hide it meanwhile.
    hides_torch = "torch" not in sys.modules and f"tensorboardX.{module}" not in sys.modules
    if hides_torch:
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        return importlib.import_module(f"tensorboardX.{module}")
    finally:
        if hides_torch:
            del sys.modules["torch"]


def _frame(data: bytes) -> bytes:
    """Encodes an event as a TFRecord entry."""
    masked_crc32c = _tensorboardx("record_writer").masked_crc32c
    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def _frames(data: bytes) -> Iterator[bytes]:
    """Yields the events in a file, without an unfinished last one."""
    start = 0
    while start + 12 <= len(data):
        end = start + 12 + struct.unpack_from("<Q", data, start)[0]
        if end + 4 > len(data):
            return
        yield data[start + 12 : end]
        start = end + 4


class Events:
    """Writes `tensorboard/events.out.tfevents.run`. After any failure it warns once and writes no more events.

    Args:
      workdir: an existing folder.
      warning: called with the text of the warning.
    """

    def __init__(self, workdir: Path, warning: Callable[[str], None]):
        self._path = workdir / "tensorboard" / _NAME
        self._warning = warning
        self._log: Log | None = None

    def start(self, config: str, step: int, before: int) -> None:
        """Starts the file, or truncates it to the state at a step from which the run resumes.

        Args:
          config: the run's config, as Markdown.
          step: images of later steps are dropped.
          before: scalars of this and later steps are dropped.
        """

        def restart(log: Log) -> None:
            Event, text = _tensorboardx("proto.event_pb2").Event, _tensorboardx("summary").text
            kept = bytearray(_frame(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString()))
            kept += _frame(Event(wall_time=time.time(), summary=text(_CONFIG, config)).SerializeToString())
            for data in _frames(self._path.read_bytes()) if self._path.exists() else ():
                event = Event.FromString(data)
                values = event.summary.value
                last = step if values and values[0].HasField("image") else before - 1
                if values and event.step <= last and not values[0].tag.startswith(_CONFIG):
                    kept += _frame(data)
            self._path.parent.mkdir(exist_ok=True)
            log.replace(bytes(kept))

        self._log = Log(self._path)
        self._try(restart)

    def scalars(self, row: dict[str, Any]) -> None:
        """Adds the numbers of a line of metrics.jsonl, each under its name, at the line's step."""
        self._add(row["step"], [{"tag": name, "simple_value": x} for name, x in row.items() if name != "step"])

    def image(self, name: str, png: bytes, step: int) -> None:
        """Adds a PNG image."""
        width, height = struct.unpack_from(">II", png, 16)  # from the PNG's header
        image = {"encoded_image_string": png, "width": width, "height": height, "colorspace": 4}  # 4: RGBA
        self._add(step, [{"tag": name, "image": image}])

    def sync(self) -> None:
        """Returns once everything that was added is in the file."""
        self._try(Log.sync)

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        def append(log: Log) -> None:
            event = _tensorboardx("proto.event_pb2").Event(wall_time=time.time(), step=step, summary={"value": values})
            log.append(_frame(event.SerializeToString()))

        self._try(append)

    def _try(self, action: Callable[[Log], None]) -> None:
        if self._log is None:
            return
        try:
            action(self._log)
        except Exception as error:
            self._log = None
            self._warning(f"TensorBoard events are no longer written: {error.__cause__ or error}")
