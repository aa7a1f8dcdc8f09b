"""The handwritten digits that scikit-learn ships: 1,797 images of 8 × 8 pixels."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

from jaxlightning import DataLoader, DataModule


class Digits(DataModule):
    """Four fifths to train on, one fifth to test on."""

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        x = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
        y = labels.astype(np.int32)
        order = np.random.default_rng(0).permutation(len(x))
        cut = len(x) * 4 // 5
        self.train = {"x": x[order[:cut]], "y": y[order[:cut]]}
        self.held_out = {"x": x[order[cut:]], "y": y[order[cut:]]}

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=64, shuffle=True, drop_last=True)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=len(self.held_out["y"]))
