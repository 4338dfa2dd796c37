import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from lq.data import DigitsDataModule
from lq.models import create_model, digits_cnn, resnet20, resnet56

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.mark.parametrize(
    ("factory", "images", "classes"),
    [
        pytest.param(resnet20, (3, 32, 32), 10, id="resnet20"),
        pytest.param(resnet56, (3, 32, 32), 100, id="resnet56"),
        pytest.param(digits_cnn, (1, 8, 8), 10, id="digits_cnn"),
    ],
)
def test_output_shape(factory, images, classes):
    assert factory(classes).eval()(torch.zeros(2, *images)).shape == (2, classes)


def test_option_a_shortcut_is_the_subsampled_image_between_zeros():
    x = torch.randn(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    shortcut = resnet20().layer2[0].shortcut
    torch.testing.assert_close(shortcut(x), expected, atol=0, rtol=0)


@pytest.mark.parametrize("factory", [resnet20, resnet56])
def test_published_weights_load_strictly(shared_data, factory):
    weights = load_file(shared_data / f"weights/{factory.__name__}_cifar10.safetensors")
    factory().load_state_dict(weights, strict=True)


def cifar10_test_images(shared_data: Path) -> tuple[Tensor, Tensor]:
    sheet = np.asarray(Image.open(shared_data / "cifar10/test_first5000.webp").convert("RGB"))
    tiles = sheet.reshape(-1, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    images = (torch.tensor(tiles) / 255 - MEAN) / STD
    labels = np.load(shared_data / "cifar10/labels.npz")["test_first5000"]
    return images, torch.tensor(labels, dtype=torch.int64)


@pytest.mark.parametrize(
    ("factory", "top1"),
    [
        pytest.param(resnet20, 0.9148, id="resnet20"),
        pytest.param(resnet56, 0.9296, id="resnet56", marks=pytest.mark.slow),
    ],
)
def test_published_weights_reach_their_accuracy(shared_data, factory, top1):
    images, labels = cifar10_test_images(shared_data)
    model = factory().eval()
    model.load_state_dict(
        load_file(shared_data / f"weights/{factory.__name__}_cifar10.safetensors")
    )
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in images.split(500)])
    # An image at a decision boundary may fall either way with another convolution algorithm.
    assert (found == labels).float().mean().item() == pytest.approx(top1, abs=0.0004)


def test_digits_cnn_learns_digits_and_survives_int8():
    import lq

    torch.manual_seed(0)
    data, model = DigitsDataModule(batch_size=32), digits_cnn()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for _ in range(8):
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        scheduler.step()

    def top1() -> float:
        with torch.no_grad():
            hits = [(model(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
        return float(torch.cat(hits).mean())

    model.eval()
    in_float = top1()
    assert in_float >= 0.98
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), data.calibration_dataloader())
    assert top1() >= in_float - 0.01


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("lq.models.resnet20", {"num_classes": 7}, id="ours"),
        pytest.param("torchvision.models.resnet18", {"num_classes": 7}, id="torchvision"),
        pytest.param("timm.create_model", {"model_name": "resnet10t", "num_classes": 7}, id="timm"),
        pytest.param("torch.nn.Linear", {"in_features": 2, "out_features": 7}, id="a class"),
    ],
)
def test_create_model_calls_a_dotted_factory(name, arguments):
    pytest.importorskip(name.split(".")[0])
    last = [m for m in create_model(name, **arguments).modules() if isinstance(m, nn.Linear)][-1]
    assert last.out_features == 7


def test_create_model_returns_a_module_as_it_is():
    model = nn.Linear(2, 2)
    assert create_model(model) is model


MISTAKES = [
    ("resnet18", {}, "dotted name such as .* got 'resnet18'"),
    ("lq.models.a b", {}, "dotted name"),
    ("nosuchpackage.models.net", {}, r"'nosuchpackage'.*pip install nosuchpackage"),
    ("torchvision.modles.resnet18", {}, "'torchvision' has no 'modles'; did you mean 'models'"),
    ("lq.models.resnet21", {}, "'lq.models' has no 'resnet21'; did you mean 'resnet20'"),
    ("lq.nowhere.net", {}, "'lq' has no 'nowhere'"),
    ("torchvision.models", {}, "callable that makes a model, but it is of type module"),
    ("torchvision.models.list_models", {}, "return an nn.Module, but got list"),
    ("lq.models.resnet20", {"classes": 3}, "take `classes`.*did you mean 'num_classes'"),
    ("torchvision.models.resnet18", {"clases": 3}, "take `clases`.*did you mean 'num_classes'"),
    ("torch.nn.Linear", {"in_features": 3}, "missing a required argument: 'out_features'"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), MISTAKES)
def test_mistakes_are_named_in_one_line(name, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(name, **arguments)
    assert str(caught.value).startswith("Expected")
    assert "\n" not in str(caught.value)


def test_arguments_for_a_built_module_are_refused():
    with pytest.raises(ValueError, match="already built, but got num_classes"):
        create_model(nn.Linear(2, 2), num_classes=3)


def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> str:
    """Make a package with a module of the given source importable, and return its name."""
    package = tmp_path / "lq_user_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "net.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.startswith(package.name)]:
        monkeypatch.delitem(sys.modules, name)
    return package.name


def test_a_dependency_that_is_missing_is_named(tmp_path, monkeypatch):
    name = user_package(tmp_path, monkeypatch, "import nosuchdependency")
    with pytest.raises(ValueError, match="'nosuchdependency', which is not there"):
        create_model(f"{name}.net.Net")


def test_an_error_inside_a_factory_is_not_hidden(tmp_path, monkeypatch):
    name = user_package(tmp_path, monkeypatch, "def net(width=1): return width + 'x'")
    with pytest.raises(TypeError, match="unsupported operand"):
        create_model(f"{name}.net.net", width=2)


def test_an_instance_is_refused(tmp_path, monkeypatch):
    name = user_package(tmp_path, monkeypatch, "import torch; net = torch.nn.Linear(2, 2)")
    with pytest.raises(ValueError, match="a model already built"):
        create_model(f"{name}.net.net")
