"""scikit-learn's handwritten digits: 8 x 8 pixels in 17 grey levels."""

import torch

from fedpeft_dist.data.datasets import Dataset, ImageSet
from fedpeft_dist.data.source import DataSource


class DigitsSource(DataSource):
    """500 of the samples are for testing. The stratified split is the same for every seed."""

    classes = 10

    def load(self, seed: int) -> Dataset:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        parts = train_test_split(range(len(labels)), test_size=500, stratify=digits.target, random_state=0)
        train, test = (ImageSet(images[part], labels[part]) for part in parts)
        return Dataset(train, test, tuple("0123456789"))
