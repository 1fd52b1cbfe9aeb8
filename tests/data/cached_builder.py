"""Stores data sets in the cache of Hugging Face `datasets`, as `load_dataset` does with one of the Hub.

In a module of its own, because `datasets` replaces `open` and `Path` in the modules of builders.
"""

import datasets


class CachedBuilder(datasets.GeneratorBasedBuilder):
    """Has the configs of `configs`, which maps their names to a `DatasetDict` each."""

    BUILDER_CONFIGS = [datasets.BuilderConfig("big"), datasets.BuilderConfig("small")]  # noqa: RUF012
    configs: dict[str, datasets.DatasetDict] = {}  # noqa: RUF012

    def _info(self):
        return datasets.DatasetInfo(features=next(iter(self.configs[self.config.name].values())).features)

    def _split_generators(self, dl_manager):
        splits = self.configs[self.config.name]
        return [datasets.SplitGenerator(split, {"examples": examples}) for split, examples in splits.items()]

    def _generate_examples(self, examples):
        yield from enumerate(examples.cast_column("image", datasets.Image(decode=False)))
