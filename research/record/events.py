"""Writes TensorBoard events without TensorFlow: `tensorboard --logdir=<workdir>` shows them.

tensorboardX has the protocol buffers and the checksum. Its writers are not used: they write in a background thread, so
that a full disk blocks training and `flush` returns before everything is in the file; they cannot write to all object
stores; and they cannot truncate.

A file is a TFRecord: for each event its length, the length's checksum, the event, and the event's checksum.
"""

import importlib
import json
import struct
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from research.record import storage
from research.record.output import Output
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


def _encode(**fields: Any) -> bytes:
    """Encodes an event as a TFRecord entry."""
    masked_crc32c = _tensorboardx("record_writer").masked_crc32c
    data = _tensorboardx("proto.event_pb2").Event(wall_time=time.time(), **fields).SerializeToString()
    header = struct.pack("<Q", len(data))
    return header + struct.pack("<I", masked_crc32c(header)) + data + struct.pack("<I", masked_crc32c(data))


def _decode(data: bytes) -> Iterator[tuple[Any, int]]:
    """Yields the events in a file, each with the offset of its end; leaves out an unfinished last one."""
    start = 0
    while start + 12 <= len(data):
        end = start + 16 + struct.unpack_from("<Q", data, start)[0]
        if end > len(data):
            return
        yield _tensorboardx("proto.event_pb2").Event.FromString(data[start + 12 : end - 4]), end
        start = end


def _find_superseded(data: bytes, step: int) -> tuple[int, Any]:
    """Returns the size of a file without the events of `step` and later steps, and the last config in it, or None."""
    size, config = 0, None
    for event, end in _decode(data):
        values = event.summary.value
        if values and event.step >= step:
            break
        size = end
        if values and values[0].tag.startswith(_CONFIG):
            config = event.summary
    return size, config


class Events(Output):
    """Writes `tensorboard/events.out.tfevents.run.<number>`. After any failure it warns once and writes no more events.

    Args:
      workdir: an existing folder.
      warning: called with the text of the warning.
    """

    def __init__(self, workdir: Path, warning: Callable[[str], None]):
        self._folder = workdir / "tensorboard"
        self._warning = warning
        self._log: Log | None = None

    def start(self, config: dict[str, Any], step: int, rows: list[dict[str, Any]]) -> None:
        """Starts a new file, and removes the events of `step` and later steps from the earlier ones."""
        del rows  # the earlier files have them
        markdown = textwrap.indent(json.dumps(config, indent=2), "    ")  # a code block

        def start() -> None:
            self._folder.mkdir(exist_ok=True)
            files = {path: path.read_bytes() for path in sorted(self._folder.glob(f"{_NAME}*"))}
            found = {path: _find_superseded(data, step) for path, data in files.items()}
            configs = [config for _, config in found.values() if config is not None]
            # TensorBoard reads a file to its end and then the next one, whose START event makes it forget the
            # superseded steps. A file that it has open must therefore neither be replaced nor grow again.
            new = _encode(file_version="brain.Event:2") + _encode(step=step, session_log={"status": "START"})
            summary = _tensorboardx("summary").text(_CONFIG, markdown)
            if configs[-1:] != [summary]:
                new += _encode(step=step - 1, summary=summary)
            last = max((int(path.suffix[1:]) for path in files if path.suffix[1:].isdecimal()), default=0)
            self._log = Log(self._folder / f"{_NAME}.{last + 1:06}")
            self._log.append(new)
            self._log.sync()
            for path, (size, _) in found.items():
                if size < len(files[path]):
                    storage.truncate(path, size)

        self._try(start)

    def scalars(self, row: dict[str, Any]) -> None:
        """Adds the numbers of a line of metrics.jsonl, each under its name, at the line's step."""
        self._add(row["step"], [{"tag": name, "simple_value": x} for name, x in row.items() if name != "step"])

    def image(self, name: str, png: bytes, step: int) -> None:
        """Adds a PNG image."""
        width, height = struct.unpack_from(">II", png, 16)  # from the PNG's header
        image = {"encoded_image_string": png, "width": width, "height": height, "colorspace": 4}  # 4: RGBA
        self._add(step, [{"tag": name, "image": image}])

    def summary(self, summary: dict[str, Any]) -> None:
        """As `sync`."""
        self.sync()

    def sync(self) -> None:
        """Returns once everything that was added is in the file."""
        if self._log is not None:
            self._try(self._log.sync)

    def close(self, failed: bool) -> None:
        """As `sync`."""
        self.sync()

    def _add(self, step: int, values: list[dict[str, Any]]) -> None:
        if (log := self._log) is not None:
            self._try(lambda: log.append(_encode(step=step, summary={"value": values})))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._log = None
            self._warning(f"TensorBoard events are no longer written: {error.__cause__ or error}")
