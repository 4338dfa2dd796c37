"""Float models to start from: factories, and the dotted names they go by."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lq.messages import suggest


class Subsample(nn.Module):
    """The shortcut without parameters, "option A": every second pixel, new channels zero.

    Args:
        channels: Channels to add, half before and half after those there are.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, C, H, W]`` as ``[N, C + channels, H / 2, W / 2]``."""
        before = self.channels // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, self.channels - before))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the sum with their input.

    ``y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        stride: 1, or 2 to halve height and width.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else Subsample(outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[N, outputs, H / stride, W / stride]``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """The ResNet for 32x32 images: three stages of 16, 32 and 64 channels.

    He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2, shortcuts
    "option A". The number of layers is ``6 * blocks + 2``.

    Args:
        blocks: Residual blocks in each stage.
        num_classes: Number of classes.
        in_channels: Channels of the images.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16)
        self.layer2 = _stage(blocks, 16, 32)
        self.layer3 = _stage(blocks, 32, 64)
        self.linear = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[N, num_classes]`` of images ``[N, in_channels, H, W]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


def _stage(blocks: int, inputs: int, outputs: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride=1 if inputs == outputs else 2)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs) for _ in range(blocks - 1)))


def _initialize(model: nn.Module) -> None:
    """Draw weights as He et al. 2015 do: variance 2 over the number of inputs."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def resnet20(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return the 20-layer CIFAR ResNet, untrained: 0.27 million parameters.

    Example:
        >>> sum(p.numel() for p in resnet20().parameters())
        269722
    """
    return CifarResNet(3, num_classes, in_channels)


def resnet56(num_classes: int = 10, in_channels: int = 3) -> CifarResNet:
    """Return the 56-layer CIFAR ResNet, untrained: 0.85 million parameters."""
    return CifarResNet(9, num_classes, in_channels)


def digits_cnn(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Return a tiny CNN for 8x8 images, untrained: two convolutions around a residual block.

    Example:
        >>> import torch
        >>> digits_cnn()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    model = nn.Sequential(
        *_conv_bn_relu(in_channels, 32, stride=1),
        BasicBlock(32, 32),
        *_conv_bn_relu(32, 64, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
    _initialize(model)
    return model


def _conv_bn_relu(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def create_model(model: str | nn.Module, **kwargs: Any) -> nn.Module:
    """Return the model that a dotted factory makes.

    Args:
        model: Dotted name of a callable that returns a module, such as ``lq.models.resnet20``,
            ``torchvision.models.resnet18`` or ``timm.create_model``; a module is returned as it is.
        kwargs: Arguments of the factory.

    Raises:
        ValueError: If there is no such factory, it does not take the arguments, or returns
            something else than a module.

    Example:
        >>> create_model("torch.nn.Linear", in_features=3, out_features=2)
        Linear(in_features=3, out_features=2, bias=True)
    """
    if isinstance(model, nn.Module):
        if kwargs:
            raise ValueError(
                f"Expected no arguments with a model that is already built, but got "
                f"{', '.join(kwargs)}; pass the dotted name of its factory instead."
            )
        return model
    made = _call(model, _resolve(model), kwargs)
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"Expected {model!r} to return an nn.Module, but got {type(made).__name__}; "
            "pass the dotted name of a factory or a class of models."
        )
    return made


def _resolve(name: str) -> Callable[..., Any]:
    """Return what a dotted name refers to."""
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        raise ValueError(
            "Expected `model` to be a dotted name such as 'torchvision.models.resnet18', "
            f"but got {name!r}; write the module in front of it."
        )
    try:
        found = pkgutil.resolve_name(name)
    except ImportError as error:
        raise _not_importable(name, error) from None
    except AttributeError as error:
        raise _not_found(name, error.obj, str(error.name)) from None
    if not callable(found) or isinstance(found, nn.Module):
        kind = "a model already built" if callable(found) else f"of type {type(found).__name__}"
        raise ValueError(
            f"Expected {name!r} to be a callable that makes a model, but it is {kind}; "
            "name a function or a class."
        )
    return found  # type: ignore[no-any-return]


def _not_importable(name: str, error: ImportError) -> ValueError:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        return ValueError(
            f"Expected `model` to name an importable factory, but {name!r} needs the package "
            f"{package!r}, which is not there; install it (`pip install {package}`), or put the "
            "folder that holds it on PYTHONPATH."
        )
    reason = " ".join(str(error).split())
    return ValueError(
        f"Expected `model` to name an importable factory, but {name!r} cannot be imported: {reason}"
    )


def _not_found(name: str, holder: Any, missing: str) -> ValueError:
    """Return the error for a name that is neither an attribute nor a module of its holder."""
    where = getattr(holder, "__name__", str(holder))
    names = [n for n in dir(holder) if not n.startswith("_")]
    if hasattr(holder, "__path__"):
        try:  # pkgutil hides why the import of a submodule failed.
            importlib.import_module(f"{where}.{missing}")
        except ImportError as error:
            if error.name != f"{where}.{missing}":
                return _not_importable(name, error)
        names += [m.name for m in pkgutil.iter_modules(holder.__path__)]
    return ValueError(
        f"Expected `model` to name a factory, but got {name!r} and {where!r} has no {missing!r}; "
        f"{suggest(missing, names)}"
    )


_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def _call(name: str, factory: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """Call a factory; arguments it does not take, however deep, are a ValueError."""
    refuse = partial(_wrong_arguments, name, factory, kwargs)
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        signature = None  # Some callables written in C have none.
    if signature is not None:
        try:
            signature.bind(**kwargs)
        except TypeError as error:
            raise refuse(error) from None
    try:
        return factory(**kwargs)
    except TypeError as error:
        # A factory that takes **kwargs passes them on: torchvision's do.
        match = _UNEXPECTED.search(str(error))
        if match and match[1] in kwargs:
            raise refuse(error) from None
        raise


def _wrong_arguments(
    name: str, factory: Callable[..., Any], kwargs: dict[str, Any], error: TypeError
) -> ValueError:
    match = _UNEXPECTED.search(str(error))
    if not match:
        given = ", ".join(kwargs) or "none"
        return ValueError(
            f"Expected the arguments that {name!r} takes, but got {given}: "
            f"{' '.join(str(error).split())}."
        )
    parameters = inspect.signature(factory).parameters.values()
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    known = [n for n in named if n not in kwargs] + ["num_classes"] * (len(named) < len(parameters))
    hint = suggest(match[1], known) if known else "it takes none."
    return ValueError(f"Expected {name!r} to take `{match[1]}`, but it does not; {hint}")
