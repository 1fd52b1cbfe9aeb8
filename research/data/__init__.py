"""Data sets, the order of their examples, augmentation, and the input pipeline."""
