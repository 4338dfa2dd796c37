"""Layers that another toolkit has quantized already, told by where their classes come from."""

from __future__ import annotations

from torch import nn

_TOOLKITS = {
    "torchao": "torchao",
    "optimum.quanto": "quanto",
    "quanto": "quanto",
    "bitsandbytes": "bitsandbytes",
    "torch.ao": "torch.ao",
    "modelopt": "nvidia-modelopt; bring it along with lq.interop.from_modelopt",
    "pytorch_quantization": (
        "pytorch-quantization; bring it along with lq.interop.from_pytorch_quantization"
    ),
}
"""Package -> toolkit, and how its models are brought along."""
_KINDS = ("Linear", "Conv", "Embedding")


def toolkit_of(module: nn.Module) -> str | None:
    """Return the toolkit that has quantized a layer, ``None`` where none has.

    It is told by the module of the layer's class, or of the class of its weight: no toolkit is
    imported for it.

    Example:
        >>> toolkit_of(nn.Linear(2, 2)) is None
        True
    """
    if not any(kind in c.__name__ for kind in _KINDS for c in type(module).__mro__):
        return None
    weight = module._parameters.get("weight", getattr(module, "weight", None))
    for cls in (*type(module).__mro__, type(weight)):
        for package, toolkit in _TOOLKITS.items():
            if f"{cls.__module__}.".startswith(f"{package}."):
                return toolkit
    return None
