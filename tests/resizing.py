"""Image sets to copy with `research.data.resize`, and what their copies contain."""

import io
import os
import signal

import numpy as np
from PIL import ExifTags, Image

from research.data import resized_copy, tfds_records
from research.data.source import Source

NAMES = ("cat", "été", "two words")


def pixels(height, width, seed=0):
    """A smooth image of random colors, which JPEG changes little, uint8 [h, w, 3]."""
    corners = np.random.default_rng(seed).integers(50, 200, (2, 2, 3), np.uint8)
    return np.asarray(Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC))


def encoded(array, file_format, mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).convert(mode).save(buffer, file_format, **options)
    return buffer.getvalue()


def rotated(array):
    """A JPEG file that EXIF rotates by 90 degrees to the right."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return encoded(array, "JPEG", exif=exif, quality=95)


class ListSource(Source):
    """Records in a list. One that is an exception is raised; a signal is sent to the process that reads the record."""

    def __init__(self, records, channels=3):
        self.records, self.channels, self.fingerprint = records, channels, f"{len(records)} records"
        self.num_read = 0

    def __len__(self):
        return len(self.records)

    def __getitem__(self, number):
        self.num_read += 1
        record = self.records[number]
        if isinstance(record, Exception):
            raise record
        if isinstance(record, signal.Signals):
            os.kill(os.getpid(), record)
            return example(number)
        return record

    def record_name(self, number):
        return f"picture {number}.jpg"


def example(number, image=None):
    return {"image": image or encoded(pixels(20 + number % 3, 30, number), "JPEG"), "label": number % 3, "id": number}


def examples(count):
    return [example(number) for number in range(count)]


def write(out, *records, side=16, names=NAMES, channels=3, **options):
    """Writes a copy of records that are all in the split train."""
    return resized_copy.write_copy("pets", names, {"train": ListSource(list(records), channels)}, out, side, **options)


def read(path, split="train"):
    """Reads the examples of a copy by TFDS, with encoded images."""
    tfds = tfds_records.import_tfds()
    source = tfds.builder_from_directory(path).as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return [source[number] for number in range(len(source))]


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def decoded(image):
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)
