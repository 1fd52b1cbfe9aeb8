"""Pipelines that read photographs: each yields batches of random crops, uint8 [batch, size, size, 3], endlessly.

`python -m benchmarks.input.pipelines NAME FILES SIZE BATCH SECONDS CORES` measures one and prints images per second.
FILES has one path a line. All draw crops of 8 to 100% of the area and 3/4 to 4/3 in aspect ratio (Szegedy et al. 2015)
and resize bilinearly; none flips or normalizes.
"""

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def meshwork(files: list[str], size: int, batch: int, cores: int) -> Iterator[Any]:
    """This project: the files as a source, in threads, to arrays on the device."""
    del cores  # as many threads as the process may use cores
    from research.data.source import Source

    class Files(Source):
        fingerprint = ""

        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, number: int) -> dict[str, Any]:
            return {"image": Path(files[number]).read_bytes(), "label": 0}

    yield from _train_batches(Files(), size, batch)


def meshwork_resized(files: list[str], size: int, batch: int, cores: int) -> Iterator[Any]:
    """This project, from a copy of the set that `research.data.resize` wrote: its folder is FILES' only line."""
    del cores
    from research.data import sources

    folder = Path(files[0])
    _, splits = sources.open_records(folder.name, str(folder.parent))
    yield from _train_batches(splits["train"], size, batch)


def _train_batches(source: Any, size: int, batch: int) -> Iterator[Any]:
    import jax

    from research import sharding
    from research.config import Config, DatasetConfig
    from research.data.pipeline import TrainBatches
    from research.data.streamed import StreamedSplit

    config = Config(batch_size=batch, dataset=DatasetConfig(name="photographs", image_size=size))
    split = StreamedSplit("train", source, config.dataset)
    batches = TrainBatches(split, config, sharding.make_mesh(config), resident=False, capacity=1)
    while True:
        yield jax.block_until_ready(batches.take(1))


def tf_data(files: list[str], size: int, batch: int, cores: int) -> Iterator[Any]:
    """`tf.data` with `decode_and_crop_jpeg`, as in flax/examples and big_vision."""
    import jax
    import tensorflow as tf

    tf.config.threading.set_inter_op_parallelism_threads(cores)
    tf.config.threading.set_intra_op_parallelism_threads(cores)

    def crop(path: Any) -> Any:
        encoded = tf.io.read_file(path)
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            tf.zeros((0, 0, 4)),
            aspect_ratio_range=_RATIO,
            area_range=_AREA,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        top, left, _ = tf.unstack(begin)
        height, width, _ = tf.unstack(extent)
        image = tf.io.decode_and_crop_jpeg(encoded, tf.stack([top, left, height, width]), channels=3)
        image = tf.image.resize(image, (size, size), "bilinear")
        return tf.cast(tf.round(image), tf.uint8)

    order = tf.data.Dataset.from_tensor_slices(files).repeat().shuffle(len(files))
    options = tf.data.Options()
    options.threading.private_threadpool_size = cores
    data = order.map(crop, num_parallel_calls=cores).batch(batch, drop_remainder=True).prefetch(2).with_options(options)
    for images in data.as_numpy_iterator():
        yield jax.block_until_ready(jax.device_put(images))


def torchvision_pil(files: list[str], size: int, batch: int, cores: int) -> Iterator[Any]:
    """torchvision's `RandomResizedCrop` of PIL images in a `DataLoader` with a worker process for each core."""
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms import v2

    crop = v2.Compose([v2.RandomResizedCrop(size, _AREA, _RATIO), v2.PILToTensor()])
    return _data_loader(files, batch, cores, lambda path: crop(pil_loader(path)))


def torchvision_tensors(files: list[str], size: int, batch: int, cores: int) -> Iterator[Any]:
    """torchvision's `decode_jpeg` and `RandomResizedCrop` of tensors in threads."""
    import concurrent.futures

    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    crop = v2.RandomResizedCrop(size, _AREA, _RATIO, antialias=True)

    def read(path: str) -> Any:
        return crop(decode_jpeg(read_file(path), ImageReadMode.RGB))

    with concurrent.futures.ThreadPoolExecutor(cores) as threads:
        endless = itertools.cycle(files)
        ahead = [[threads.submit(read, next(endless)) for _ in range(batch)] for _ in range(3)]
        while True:
            ahead.append([threads.submit(read, next(endless)) for _ in range(batch)])
            yield torch.stack([future.result() for future in ahead.pop(0)])


def _data_loader(files: list[str], batch: int, cores: int, read: Callable[[str], Any]) -> Iterator[Any]:
    import torch

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, number: int) -> Any:
            torch.set_num_threads(1)
            return read(files[number])

    loader = torch.utils.data.DataLoader(
        Files(), batch, shuffle=True, num_workers=cores, drop_last=True, persistent_workers=True
    )
    while True:
        yield from loader


def dali(files: list[str], size: int, batch: int, cores: int) -> Iterator[Any]:
    """NVIDIA DALI on the CPU: `decoders.image_random_crop` and `resize`."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=cores, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> Any:
        encoded, _ = fn.readers.file(files=files, random_shuffle=True)
        image = fn.decoders.image_random_crop(
            encoded, random_area=_AREA, random_aspect_ratio=_RATIO, output_type=types.DALIImageType.RGB
        )
        return fn.resize(image, resize_x=size, resize_y=size, antialias=False)

    built = pipeline()
    built.build()
    while True:
        (images,) = built.run()
        yield images.as_array()


PIPELINES = {
    pipeline.__name__: pipeline
    for pipeline in (meshwork, meshwork_resized, tf_data, torchvision_pil, torchvision_tensors, dali)
}


def main(name: str, files: str, size: str, batch: str, seconds: str, cores: str) -> None:
    """Prints the images per second of one pipeline, without its first two batches."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])  # before any library starts its threads
    lines = Path(files).read_text(encoding="utf-8").splitlines()
    batches = PIPELINES[name](lines, int(size), int(batch), int(cores))
    for _ in range(2):
        next(batches)
    start = now = time.monotonic()
    count = 0
    while now - start < float(seconds):
        next(batches)
        count, now = count + 1, time.monotonic()
    print(count * int(batch) / (now - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
