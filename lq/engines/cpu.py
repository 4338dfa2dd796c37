"""What integer products this processor gets wrong.

Before VNNI, x86 processors multiply uint8 by int8 with ``vpmaddubsw``, which adds two products in
16 bits and saturates: ``255 * 127 + 255 * 127 = 64770`` becomes 32767. Weights of 7 bits cannot
reach that: ``2 * 255 * 64 = 32640``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from lq.export.graph import WEIGHTED, constant, producer

SAFE_WEIGHT = 64
"""Largest magnitude of a weight code whose products never saturate."""
_VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}


def cpu_flags() -> set[str]:
    """Return the features of an x86 processor; none where it is another or cannot be asked."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        return next((set(v.split()) for k, _, v in lines if k.strip() == "flags"), set())
    ask = getattr(torch.cpu, "get_capabilities", dict)  # newer than the oldest torch we take
    return {name for name, present in ask().items() if present is True}


def saturates() -> bool:
    """Return whether this is an x86 processor without VNNI."""
    flags = cpu_flags()
    return "sse2" in flags and not flags & _VNNI


def first_hazard(model: ir.Model) -> str | None:
    """Return the first layer whose integer products can saturate 16 bits, ``None`` without one."""
    for node in model.graph:
        if node.op_type in WEIGHTED and producer(node.inputs[0], "DequantizeLinear") is not None:
            weight = producer(node.inputs[1], "DequantizeLinear")
            codes = constant(weight.inputs[0]) if weight is not None else None
            if codes is not None and np.abs(codes.astype(np.int16)).max() > SAFE_WEIGHT:
                return str(node.name)
    return None
