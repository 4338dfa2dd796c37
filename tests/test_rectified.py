"""Tensors that are never negative: their codes have no sign where a recipe says so."""

import pytest
import torch
import torchvision
from torch import nn

import lq
from lq.dataflow import Dataflow
from lq.rectified import is_rectified, rectified_pools
from lq.surgery import quantizers


class Calls(nn.Module):
    """A forward written in the test."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.MaxPool2d(2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def rectified(function) -> bool:
    dataflow = Dataflow(Calls(function))
    flow = dataflow.flows[""]
    returned = next(node for node in flow.graph.nodes if node.op == "output").args[0]
    return is_rectified(dataflow, flow, returned)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        pytest.param(lambda m, x: m.relu(m.conv(x)), True, id="module"),
        pytest.param(lambda m, x: torch.relu(m.conv(x)), True, id="function"),
        pytest.param(lambda m, x: m.conv(x).relu(), True, id="method"),
        pytest.param(lambda m, x: m.inner(x).flatten(1), True, id="inner, moved"),
        pytest.param(lambda m, x: m.pool(m.relu(x)), True, id="averaged"),
        pytest.param(lambda m, x: torch.cat([m.relu(x), m.inner(x)]), True, id="joined"),
        pytest.param(lambda m, x: torch.cat([m.relu(x), x]), False, id="joined with an image"),
        pytest.param(lambda m, x: m.conv(m.relu(x)), False, id="convolved"),
        pytest.param(lambda m, x: m.relu(x) + x, False, id="added"),
        pytest.param(lambda m, x: x, False, id="image"),
    ],
)
def test_what_is_rectified(function, expected) -> None:
    assert rectified(function) is expected


def test_pools_that_read_alone() -> None:
    def pooled(m, x):
        x, y = m.relu(x), m.inner(x)
        return m.pool(x) * x, nn.functional.avg_pool2d(y, 2), nn.functional.avg_pool2d(m.conv(x), 2)

    dataflow = Dataflow(Calls(pooled))
    (pool,) = rectified_pools(dataflow, dataflow.flows[""])
    assert str(pool.all_input_nodes[0].target) == "inner"


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "mobilenet_v3_small", "googlenet"])
def test_unsigned_is_what_never_is_negative(name) -> None:
    torch.manual_seed(0)
    given = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(num_classes=10, **given)
    lq.quantize(model, lq.Recipe(residual="both", unsigned=True, pooling=True))
    lowest = {}
    for key, quantizer in quantizers(model).items():
        if quantizer.spec.axis is None:
            quantizer.register_forward_pre_hook(
                lambda _, args, key=key: lowest.update({key: float(args[0].min())})
            )
    with torch.no_grad():
        lq.calibrate(model, [torch.randn(4, 3, 64, 64)], progress=False)
        model.train()(torch.randn(4, 3, 64, 64))
    unsigned = {key for key in lowest if not quantizers(model)[key].spec.signed}
    assert all(lowest[key] >= 0 for key in unsigned)
    assert len(unsigned) > 5
    others = {key for key in lowest.keys() - unsigned if lowest[key] >= 0}
    assert name == "mobilenet_v3_small" or not others  # its squeeze averages what is no ReLU's


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", "avgpool.input_quantizer"),
        ("mobilenet_v2", "features.18.2.output_quantizer"),
        ("efficientnet_b0", None),
    ],
)
def test_pooling_reads_integers_behind_a_relu(name, expected) -> None:
    def found(pooling: bool) -> set[str]:
        model = getattr(torchvision.models, name)()
        return set(quantizers(lq.quantize(model, lq.Recipe(pooling=pooling))))

    assert found(True) - found(False) == ({expected} if expected else set())


def test_a_rule_leaves_pooling_float() -> None:
    recipe = lq.Recipe(pooling=True, rules=(lq.Rule(type="AdaptiveAvgPool2d", format="skip"),))
    model = lq.quantize(torchvision.models.resnet18(), recipe)
    assert "avgpool.input_quantizer" not in quantizers(model)


def small() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU6()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).eval(), torch.randn(4, 3, 12, 12)


def test_tensorrt_is_refused_by_layer(tmp_path) -> None:
    model, x = small()
    lq.calibrate(lq.quantize(model, "onnxruntime_int8"), [x], progress=False)
    with pytest.raises(ValueError, match=r"tensorrt cannot run layer '2'.*unsigned"):
        lq.export_onnx(model, x, tmp_path / "m.onnx")


def test_quantizing_again_keeps_ranges() -> None:
    model, x = small()
    lq.calibrate(lq.quantize(model, "onnxruntime_int8"), [x], progress=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    after = lq.quantize(model, "onnxruntime_int8").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_scales_of_the_other_kind_are_not_loaded() -> None:
    model, x = small()
    lq.calibrate(lq.quantize(model, "onnxruntime_int8"), [x], progress=False)
    signed = lq.quantize(small()[0], lq.Recipe(residual="both", pooling=True))
    with pytest.raises(RuntimeError, match="`unsigned` is True there, but False here"):
        signed.load_state_dict(model.state_dict())


def test_unknown_values() -> None:
    with pytest.raises(ValueError, match="`unsigned` to be true or false, but got 'yes'"):
        lq.Recipe.from_dict({"unsigned": "yes"})
