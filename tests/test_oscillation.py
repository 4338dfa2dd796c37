"""Oscillating weights, against the paper's algorithm written out in numpy, weight by weight."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import lq
from lq.functional import fake_quantize
from lq.latent import latent_layers, latent_weight, masked_weight
from lq.oscillation import (
    OscillationTracker,
    annealed,
    dampening_gradient,
    dampening_loss,
    oscillation,
)
from lq.stabilizer import Stabilizer


class ByHand:
    """Algorithm 1 of Nagel et al. 2022 for one weight at a time."""

    def __init__(self, codes, momentum):
        self.m = np.float32(momentum)
        self.codes, self.average = codes.astype(int), codes.astype(np.float32)
        self.last = np.zeros_like(self.codes)
        self.frequency = np.zeros(codes.shape, np.float32)
        self.frozen = np.zeros(codes.shape, bool)

    def step(self, weight, scale, qmin, qmax, threshold):
        """Return the weight with what is frozen put back."""
        weight = weight.copy()
        for i in np.ndindex(weight.shape):
            if self.frozen[i]:
                weight[i] = np.float32(self.codes[i]) * scale[i]
            code = int(np.clip(np.round(weight[i] / scale[i]), qmin, qmax))
            change = code - self.codes[i]
            oscillates = change != 0 and np.sign(change) == -np.sign(self.last[i])
            self.last[i] = change if change != 0 else self.last[i]
            self.frequency[i] = self.frequency[i] * (1 - self.m) + self.m * oscillates
            self.average[i] = self.m * code + (1 - self.m) * self.average[i]
            self.codes[i] = code
            if self.frequency[i] > threshold and not self.frozen[i]:
                self.frozen[i] = True
                self.codes[i] = round(float(self.average[i]))
            if self.frozen[i]:
                weight[i] = np.float32(self.codes[i]) * scale[i]
        return weight


def quantizer_for(spec, channels):
    quantizer = lq.Quantizer(spec, channels)
    amax = torch.rand(()) if channels is None else torch.rand(channels)
    quantizer.amax = amax + 0.5
    return quantizer


@pytest.mark.parametrize("part", [3, 1 << 15], ids=["in parts", "whole"])
@pytest.mark.parametrize(
    ("axis", "channels"), [(None, None), (0, 5), (1, 3)], ids=["tensor", "axis 0", "axis 1"]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tracker_equals_the_algorithm_by_hand(monkeypatch, bits, axis, channels, part):
    monkeypatch.setattr("lq.oscillation._PART", part)
    torch.manual_seed(bits)
    spec = lq.QuantSpec(f"int{bits}", axis=axis, narrow=True)
    quantizer = quantizer_for(spec, channels)
    weight = torch.rand(5, 3, 2) * 3 - 1.5
    codes = lq.functional.encode(weight, quantizer.scale, spec.qmin, spec.qmax, axis)
    tracker = OscillationTracker(codes, momentum=0.1, freezes=True)
    by_hand = ByHand(codes.numpy(), 0.1)
    froze = 0
    for i in range(60):
        # To and fro about the edge of a bin, more or less far; and the scale learns meanwhile.
        step = quantizer.amax.max() / spec.qmax
        weight += torch.randn(5, 3, 2) * step * torch.rand(5, 1, 1) * (-1) ** i
        quantizer.scale.mul_(1 + 0.01 * (-1) ** (i // 7))
        shape = [-1 if n == axis else 1 for n in range(3)]
        scale = np.broadcast_to(quantizer.scale.view(shape).numpy(), (5, 3, 2))
        threshold = annealed(0.4, 0.15, i / 60)
        expected = by_hand.step(weight.numpy(), scale, spec.qmin, spec.qmax, threshold)
        tracker.step(weight, quantizer.scale, spec, threshold)
        assert np.array_equal(weight.numpy(), expected)
        assert np.array_equal(tracker.codes.numpy(), by_hand.codes)
        assert np.array_equal(tracker.frozen.numpy(), by_hand.frozen)
        np.testing.assert_allclose(tracker.frequency.numpy(), by_hand.frequency, rtol=1e-6)
        np.testing.assert_allclose(tracker.average.numpy(), by_hand.average, rtol=1e-5, atol=1e-6)
        froze = int(tracker.frozen.sum())
    assert 0 < froze < 30
    held = fake_quantize(weight, quantizer.scale, spec.qmin, spec.qmax, axis)
    assert torch.equal(held[tracker.frozen], weight[tracker.frozen])


def test_a_change_of_two_hundred_codes_does_not_overflow():
    codes = [torch.tensor([c], dtype=torch.int8) for c in (-127, 127)]
    oscillated, direction = oscillation(codes[1], codes[0], torch.tensor([-1], dtype=torch.int8))
    assert (oscillated.item(), direction.item()) == (1, 1)


@pytest.mark.parametrize("axis", [None, 1])
def test_dampening_gradient_is_autograds(axis):
    weight = (torch.randn(4, 3) * 2).requires_grad_()
    scale = torch.tensor(0.3) if axis is None else torch.tensor([0.2, 0.3, 0.4])
    (expected,) = torch.autograd.grad(dampening_loss(weight, scale, -3, 3, axis), weight)
    found = dampening_gradient(weight, scale, -3, 3, axis)
    torch.testing.assert_close(found, expected)
    outside = (weight.detach().abs() > 3 * scale).nonzero(as_tuple=True)
    assert (found[outside] == 0).all()
    centre = fake_quantize(weight.detach(), scale, -3, 3, axis)
    inside = weight.detach().clamp(-3 * scale, 3 * scale)
    torch.testing.assert_close(
        dampening_loss(weight, scale, -3, 3, axis).detach(), (centre - inside).square().sum()
    )


def quantized(model, formats="int4"):
    lq.quantize(model, {"weights": formats, "inputs": "fp32"})
    return lq.calibrate(model, [torch.rand(2, 6)], progress=False)


def test_layers_with_latent_weights():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    model[1].weight = model[0].weight
    prune.random_unstructured(model[2], "weight", 0.5)
    parametrizations.weight_norm(model[3])
    layers, others = latent_layers(quantized(model))
    assert list(layers) == ["0", "2"]
    assert others == ["3"]
    assert latent_weight(model[2]) is model[2].weight_orig
    assert torch.equal(masked_weight(model[2]), model[2].weight_orig * model[2].weight_mask)
    assert Stabilizer(model, freezes=True).others == ["3"]


def test_frozen_weights_of_a_pruned_layer_stay_pruned():
    layer = nn.Linear(6, 6)
    prune.l1_unstructured(layer, "weight", 0.5)
    model = quantized(nn.Sequential(layer))
    hidden = layer.weight_orig.detach().clone()[layer.weight_mask == 0]
    stabilizer = Stabilizer(model, freezes=True, momentum=0.5)
    for i in range(8):
        with torch.no_grad():
            layer.weight_orig += (-1) ** i * layer.weight_quantizer.scale[:, None]
            layer.weight_orig[layer.weight_mask == 0] = hidden
        stabilizer.step(model.parameters(), 0.6)
    model(torch.rand(1, 6))
    assert stabilizer.shares()["frozen"] > 0.3
    assert (layer.weight[layer.weight_mask == 0] == 0).all()
    assert torch.equal(layer.weight_orig[layer.weight_mask == 0], hidden)
    frozen = stabilizer._trackers["0"].frozen
    assert not frozen[layer.weight_mask == 0].any()
    assert torch.equal(layer.weight_quantizer(layer.weight)[frozen], layer.weight[frozen])


def test_only_what_is_quantized_to_few_bits_and_stepped_is_tracked():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    rules = [{"name": "1", "weights": "int8"}]
    lq.quantize(model, {"weights": "int4", "inputs": "fp32", "rules": rules})
    stabilizer = Stabilizer(model, freezes=False)
    assert stabilizer.has_layers
    stabilizer.step(model.parameters(), 1.0)
    assert stabilizer.shares() == {}  # not calibrated
    lq.calibrate(model, [torch.rand(2, 6)], progress=False)
    stabilizer.step(model[0].parameters(), 1.0)
    assert stabilizer.shares() == {"share": 0.0, "0/share": 0.0}
    stabilizer.step(model.parameters(), 1.0)
    assert stabilizer.shares().keys() == {"share", "0/share", "2/share"}


def test_another_format_begins_anew():
    model = quantized(nn.Sequential(nn.Linear(6, 6)))
    stabilizer = Stabilizer(model, freezes=True, momentum=0.5)
    for i in range(8):
        with torch.no_grad():
            model[0].weight += (-1) ** i * model[0].weight_quantizer.scale[:, None]
        stabilizer.step(model.parameters(), 0.6)
    assert stabilizer.shares()["frozen"] > 0.3
    quantized(model, "int3")
    stabilizer = load(Stabilizer(model, freezes=True), stabilizer)
    stabilizer.step(model.parameters(), 0.6)
    assert stabilizer.shares()["frozen"] == 0
    with pytest.raises(RuntimeError, match=r"freezes none.*freezes weights"):
        load(Stabilizer(model, freezes=False), stabilizer)


def load(stabilizer, other):
    stabilizer.load_state_dict(other.state_dict())
    return stabilizer


def test_memory_is_what_is_said():
    codes = torch.zeros(100)
    for freezes, expected in ((False, 6), (True, 11)):
        state = OscillationTracker(codes, freezes=freezes).state()
        assert sum(v.numel() * v.element_size() for v in state.values()) == expected * 100
