"""A small net that knows handwritten digits."""

import torch
from torch import nn

from lq.data import DigitsDataModule
from lq.models import digits_cnn


def trained_digits(epochs: int) -> tuple[nn.Module, DigitsDataModule]:
    """Return the net, in eval mode, and its data."""
    torch.manual_seed(0)
    data, model = DigitsDataModule(), digits_cnn()
    data.setup("fit")
    data.setup("test")
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for x, target in data.train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    return model.eval(), data
