import copy

import pytest
import torch
from torch import nn

import lq
from lq.models import resnet20
from lq.repairs import equalize
from lq.repairs.equalization import input_ranges, level_outputs, output_ranges, pair_factors
from lq.repairs.pairs import find_pairs

ONE_SCALE = lq.Recipe(weights=lq.QuantSpec(axis=None), inputs=lq.QuantSpec("fp32"))


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    norm.weight.data = torch.randn(channels)  # negative gammas too
    norm.bias.data = torch.randn(channels)
    norm.running_mean.copy_(torch.randn(channels))
    norm.running_var.copy_(torch.rand(channels) + 1e-6)
    norm.weight.data[0] = 0
    return norm


class Residual(nn.Module):
    """Its shortcut reads what the first layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(x)
        return y + self.conv2(y)


class Untraceable(nn.Module):
    """Looks at its data, around blocks that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) if x.sum() > 0 else -self.block(x)


class Pool(nn.Module):
    """Pools over what is a Linear's channels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.max_pool2d(x[None], 3, stride=1, padding=1)[0]


def mobile(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 12, 1, bias=False),
        random_norm(12),
        activation,
        nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False),
        random_norm(12),
        activation,
        nn.Conv2d(12, 6, 1),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 1, groups=2),
    )


NETS = {
    "relu": (lambda: mobile(nn.ReLU()), 3),
    "leaky": (lambda: mobile(nn.LeakyReLU(0.2)), 3),
    "relu6": (lambda: mobile(nn.ReLU6()), 1),
    "residual": (Residual, 0),
    "untraceable": (Untraceable, 1),
    "pooled linear": (lambda: nn.Sequential(nn.Linear(4, 8), Pool(), nn.Linear(8, 4)), 0),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 8), nn.PReLU(8), nn.Linear(8, 4)), 1),
}


@pytest.mark.parametrize("name", NETS)
def test_float_outputs_stay(name: str) -> None:
    torch.manual_seed(0)
    make, pairs = NETS[name]
    model = make().eval().double()
    assert len(find_pairs(model).pairs) == pairs
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):  # ranges far apart, and a dead channel
            layer.weight.data *= 10 ** torch.randn(
                len(layer.weight), *[1] * (layer.weight.dim() - 1)
            )
            layer.weight.data[1] = 0
    x = torch.randn(8, 4) if "linear" in name else torch.randn(2, 4, 8, 8)
    before, keys = copy.deepcopy(model), list(model.state_dict())
    left = equalize(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x.double()), before(x.double()), rtol=1e-9, atol=1e-9)
    changed = any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    )
    assert changed is (pairs > 0)
    assert list(model.state_dict()) == keys
    assert list(left) == (["the model"] if name == "untraceable" else [])


def test_ranges_meet() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4))
    model[0].weight.data *= torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)
    wanted = (output_ranges(model[0], None) * input_ranges(model[2])).sqrt()
    equalize(model)
    torch.testing.assert_close(output_ranges(model[0], None), wanted)
    torch.testing.assert_close(input_ranges(model[2]), wanted)


def test_input_ranges_of_groups_by_brute_force() -> None:
    layer = nn.Conv2d(6, 4, 3, groups=2)
    for channel in range(6):
        group, place = divmod(channel, 3)
        brute = layer.weight[2 * group : 2 * group + 2, place].abs().max()
        assert input_ranges(layer)[channel] == brute


def test_factors_of_dead_channels_are_one() -> None:
    factors = pair_factors(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]))
    assert factors.tolist() == [1, 1, 2]


@pytest.mark.parametrize("variance", [0.0, 1e-9, 1.0, 1e6])
def test_levelling_is_exact_at_any_variance(variance: float) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 5, 1).double(), random_norm(5).double().eval()
    conv.weight.data *= torch.logspace(-1.5, 1.5, 5).view(-1, 1, 1, 1)
    norm.running_var.fill_(variance)
    x = torch.randn(2, 2, 4, 4).double()
    with torch.no_grad():
        wanted = norm(conv(x))
        level_outputs(conv, norm)
        torch.testing.assert_close(norm(conv(x)), wanted)
    ranges = output_ranges(conv, None)
    torch.testing.assert_close(ranges[1:], ranges[-1].expand(4))


def test_one_scale_serves_all_channels_after_levelling() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), random_norm(8), nn.ReLU6()).eval()
    model[0].weight.data *= torch.logspace(-2, 2, 8).view(-1, 1, 1, 1)
    data = [torch.randn(4, 3, 8, 8)]
    reference = copy.deepcopy(model)
    errors = []
    for prepare in (lambda m: {}, equalize):
        quantized = lq.quantize(copy.deepcopy(model), ONE_SCALE)
        prepare(quantized)
        lq.calibrate(quantized, data, progress=False)
        with torch.no_grad():
            errors.append(lq.functional.sqnr_db(reference(data[0]), quantized(data[0])))
    assert errors[1] > errors[0] + 10


def test_changed_layers_must_be_calibrated_again() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    lq.quantize(model, "tensorrt_int8")
    lq.calibrate(model, [torch.randn(1, 3, 4, 4)], progress=False)
    equalize(model)
    with pytest.raises(RuntimeError, match=r"0\.weight_quantizer.*not calibrated"):
        model(torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize("how", ["called twice", "tied", "read"])
def test_shared_layers_are_left_alone(how: str) -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            if how == "tied":
                self.c = nn.Linear(4, 4)
                self.c.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.b(self.a(x))
            if how == "called twice":
                x = self.a(x)
            return x @ self.a.weight if how == "read" else x

    assert find_pairs(Shares()).pairs == ()


@pytest.mark.parametrize("residual", ["shortcut", "both"])
def test_quantizers_on_residual_additions_hide_no_pair(residual: str) -> None:
    plain, placed = (
        lq.quantize(resnet20(), lq.Recipe(residual=where)) for where in (None, residual)
    )

    found = find_pairs(placed)

    assert found.left == {}
    assert found.pairs == find_pairs(plain).pairs
    assert len(found.pairs) >= 9  # the two convolutions of each block
