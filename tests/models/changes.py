"""Whether a field of a network's config changes what the network computes."""

import numpy as np


def assert_changed(plain, changed):
    """Checks that two lists of arrays differ, in their shapes or by more than rounding."""
    same_shapes = [x.shape for x in plain] == [x.shape for x in changed]
    assert not same_shapes or max(np.abs(x - y).max() for x, y in zip(plain, changed)) > 1e-4
