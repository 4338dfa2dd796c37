"""Figures of quantizers, against numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.quantizer_health import (
    channel_axis,
    dead_channels,
    drift,
    gradient_norm,
    layer_groups,
    quantizer_health,
)


def calibrated(spec, amax, channels=None):
    quantizer = lq.Quantizer(spec, channels)
    quantizer.amax = torch.as_tensor(amax)
    return quantizer


@pytest.mark.parametrize(
    ("spec", "amax"),
    [
        pytest.param(lq.QuantSpec("int8"), 1.0, id="signed"),
        pytest.param(lq.QuantSpec("int4", signed=False), 2.0, id="unsigned"),
        pytest.param(lq.QuantSpec("int8", axis=1, narrow=True), [0.5, 1.0, 2.0], id="by-channel"),
    ],
)
def test_figures_equal_numpy(spec, amax):
    x = torch.randn(16, 3, 5, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0
    quantizer = calibrated(spec, amax, None if spec.axis is None else 3)
    found = quantizer_health(quantizer, x, quantizer(x))
    scale = np.asarray(amax, np.float32) / np.float32(spec.qmax)
    scale = scale if spec.axis is None else scale.reshape(1, 3, 1)
    codes = np.rint(x.numpy() / scale)
    clipped = np.clip(codes, spec.qmin, spec.qmax)
    noise = ((x.numpy() - clipped * scale) ** 2).sum()
    assert found["clip_rate"] == (codes != clipped).mean()
    assert found["dead_channels"] == pytest.approx(1 / 3)
    assert found["sqnr_db"] == pytest.approx(10 * np.log10((x.numpy() ** 2).sum() / noise), 1e-5)
    assert found["amax"] == pytest.approx(np.mean(amax))
    assert found["scale"] == pytest.approx(scale.mean())


def test_a_dead_quantizer():
    quantizer = calibrated(lq.QuantSpec("int8"), 1000.0)
    x = torch.full((2, 4), 0.1)
    assert quantizer_health(quantizer, x, quantizer(x))["dead_channels"] == 1
    assert dead_channels(torch.tensor([0.0, 1.0]), 0) == 0.5


def test_formats_without_a_scale_have_no_range():
    quantizer, x = lq.Quantizer(lq.QuantSpec("fp16")), torch.rand(2, 4)
    assert set(quantizer_health(quantizer, x, quantizer(x))) == {"sqnr_db", "dead_channels"}


def test_drift_is_that_of_the_channel_that_moved_furthest():
    assert drift(torch.tensor(2.0), torch.tensor(2.5)) == 0.25
    assert drift(torch.tensor([1.0, 4.0, 2.0]), torch.tensor([1.25, 2.0, 2.0])) == -0.5


def test_gradient_norm_equals_torch():
    spec = lq.QuantSpec("int8", range="lsq", symmetric=False)
    quantizer = lq.Quantizer(spec)
    quantizer.set_bounds(torch.tensor(-1.0), torch.tensor(2.0))
    assert gradient_norm(quantizer) is None
    quantizer(torch.linspace(-3, 3, 40)[None]).square().sum().backward()
    parts = [quantizer.scale.grad.item(), quantizer.offset.grad.item()]
    assert gradient_norm(quantizer) == pytest.approx(np.hypot(*parts))


@pytest.mark.parametrize(
    ("owner", "shape", "expected"),
    [
        pytest.param(nn.Conv2d(4, 8, 1), (2, 4, 6, 6), 1, id="conv"),
        pytest.param(nn.Conv1d(4, 8, 1), (2, 4, 6), 1, id="conv1d"),
        pytest.param(nn.Linear(4, 8), (2, 6, 6, 4), -1, id="linear-on-images"),
        pytest.param(nn.Identity(), (2, 4, 6, 6), 1, id="addition"),
        pytest.param(nn.Identity(), (2, 6, 4), -1, id="addition-of-tokens"),
    ],
)
def test_where_channels_are(owner, shape, expected):
    assert channel_axis(lq.Quantizer(lq.QuantSpec()), owner, torch.zeros(shape)) == expected
    by_channel = lq.Quantizer(lq.QuantSpec(axis=0, narrow=True), 8)
    assert channel_axis(by_channel, owner, torch.zeros(shape)) == 0


def test_groups_are_small_and_hold_every_name_once():
    names = [f"layer{i}.{j}.conv{k}" for i in range(1, 5) for j in range(6) for k in (1, 2)]
    names += [f"head.{i}" for i in range(30)]
    groups = layer_groups(names, largest=12)
    assert [name for group in groups.values() for name in group] == names
    assert groups["layer1"] == names[:12]
    assert max(map(len, groups.values())) <= 12
