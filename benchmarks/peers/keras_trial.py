"""A sweep's trial in Keras on TensorFlow: build, `compile`, `fit`, `evaluate`."""

import keras
import numpy as np
from keras import layers

from benchmarks.peers.keras_peer import cnn


def validation_accuracy(network: str, arrays: dict[str, np.ndarray], rate: float, epochs: int, batch: int) -> float:
    """Trains a network by Adam and returns its validation accuracy."""
    keras.backend.clear_session()  # otherwise the memory of all trials adds up
    keras.utils.set_random_seed(0)
    if network == "cnn":
        model = cnn(channels=1)
    else:
        hidden = [layers.Dense(64, activation="relu") for _ in range(2)]
        model = keras.Sequential([layers.Input((32, 32, 1)), layers.Flatten(), *hidden, layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(rate), loss=loss, metrics=["accuracy"])
    model.fit(arrays["train_image"], arrays["train_label"], batch_size=batch, epochs=epochs, verbose=0)
    return model.evaluate(arrays["validation_image"], arrays["validation_label"], batch_size=batch, verbose=0)[1]
