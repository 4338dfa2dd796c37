"""Write the folder that Triton Inference Server loads a model from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from lq.export.engine import EngineInfo
from lq.export.graph import load_graph
from lq.files import sha256, write_text, written_whole
from lq.messages import suggest

TYPES = {
    ir.DataType.BOOL: "BOOL",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.UINT16: "UINT16",
    ir.DataType.UINT32: "UINT32",
    ir.DataType.UINT64: "UINT64",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT16: "INT16",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.FLOAT: "FP32",
    ir.DataType.DOUBLE: "FP64",
    ir.DataType.STRING: "STRING",
}
"""Type of a tensor -> what Triton calls it, after ``TYPE_``."""
DEVICES = ("auto", "cpu", "gpu")
ENGINES = (".engine", ".plan", ".trt")


def triton_repository(
    path: str | Path,
    folder: str | Path,
    name: str | None = None,
    version: int = 1,
    max_batch_size: int = 64,
    queue_delay_us: int = 100,
    instances: int = 1,
    device: str = "auto",
) -> Path:
    """Write a model into a Triton model repository: its config, and the file in a version folder.

    Where the first axis of all inputs and outputs varies as one, Triton puts requests together to
    batches; another model gets ``max_batch_size: 0`` and is run as it is.

    Args:
        path: An ONNX file, which ONNX Runtime will run, or a TensorRT engine with its sidecar and
            its ONNX file beside it.
        folder: The repository; other models in it stay.
        name: Name of the model; that of the file, if not given.
        version: Version of the model; others stay, and Triton serves the highest.
        max_batch_size: Largest batch; an engine has its own, if that is smaller.
        queue_delay_us: How long a request waits for others, in microseconds.
        instances: How many requests or batches are run at a time, on each device.
        device: ``"cpu"``, ``"gpu"``, or ``"auto"``: a GPU where there is one.

    Returns:
        The folder of the model.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an argument is out of its range, or Triton cannot run the file.

    Example:
        >>> import tempfile, torch, lq
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = lq.export_onnx(torch.nn.Linear(4, 2), torch.ones(1, 4), folder / "linear.onnx")
        >>> written = triton_repository(folder / "linear.onnx", folder / "models")
        >>> sorted(str(p.relative_to(folder)) for p in written.rglob("*.*"))
        ['models/linear/1/model.onnx', 'models/linear/config.pbtxt']
    """
    path = Path(path)
    name = path.stem if name is None else name
    _check(name, version, max_batch_size, queue_delay_us, instances, device)
    is_engine = path.suffix in ENGINES
    graph = load_graph(_graph_of_engine(path) if is_engine else path).graph
    given = [value for value in graph.inputs if value.name not in graph.initializers]
    inputs, outputs = _tensors(given), _tensors(graph.outputs)
    axes = {_first_axis(value) for value in (*given, *graph.outputs)}
    batched = len(axes) == 1 and None not in axes
    if is_engine and device == "cpu":
        raise ValueError("Expected another `device` than 'cpu' for a TensorRT engine.")
    if not is_engine:
        _refuse_external_data(graph, path)
    elif batched:
        max_batch_size = min(max_batch_size, EngineInfo.load(path).batch[2])
    if not batched:
        max_batch_size = 0
    waiting = f"dynamic_batching {{ max_queue_delay_microseconds: {queue_delay_us} }}"
    lines = [
        f"name: {json.dumps(name)}",
        f'backend: "{"tensorrt" if is_engine else "onnxruntime"}"',
        f"max_batch_size: {max_batch_size}",
        *(f"input {tensor.text(batched)}" for tensor in inputs),
        *(f"output {tensor.text(batched)}" for tensor in outputs),
        f"instance_group {{ count: {instances} kind: KIND_{device.upper()} }}",
        *([waiting] if batched else []),
    ]
    target = Path(folder) / name
    # The file first: what a server finds beside a config must be there.
    with written_whole(target / str(version) / f"model.{'plan' if is_engine else 'onnx'}") as file:
        shutil.copyfile(path, file)
    write_text(target / "config.pbtxt", "\n".join(lines) + "\n")
    return target


@dataclass(frozen=True)
class _Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    """-1 where it varies."""

    def text(self, batched: bool) -> str:
        """Return what the config says of it; Triton counts the batch apart."""
        shape = list(self.shape[1:] if batched else self.shape)
        # Triton has no tensors without axes but by way of another shape.
        dims = f"dims: {shape}" if shape else "dims: [1] reshape { shape: [] }"
        return f"{{ name: {json.dumps(self.name)} data_type: TYPE_{self.dtype} {dims} }}"


def _first_axis(value: ir.Value) -> str | None:
    """Return the name of a first axis that varies."""
    axis = value.shape[0] if value.shape is not None and len(value.shape) else None
    return None if axis is None or isinstance(axis, int) else str(axis)


def _tensors(values: Iterable[ir.Value]) -> list[_Tensor]:
    found = []
    for value in values:
        if value.dtype not in TYPES or value.shape is None:
            raise ValueError(
                f"Expected {value.name!r} to have a shape and a type that Triton knows, but got "
                f"{value.type} {value.shape}; export it with another."
            )
        shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
        found.append(_Tensor(str(value.name), TYPES[value.dtype], shape))
    return found


def _graph_of_engine(path: Path) -> Path:
    """Return the ONNX file of an engine that Triton can run."""
    if not EngineInfo.path_of(path).is_file():
        raise FileNotFoundError(
            f"Expected the sidecar of {str(path)!r} beside it, but there is none; build the engine "
            "with lq.build_engine."
        )
    info = EngineInfo.load(path)
    if not info.builder.startswith("tensorrt "):
        raise ValueError(
            f"Expected an engine of TensorRT, which Triton runs, but {str(path)!r} was built by "
            f"{info.builder}; serve its ONNX file."
        )
    if info.batch[0] > 1:
        raise ValueError(
            f"Expected an engine whose smallest batch is 1, but {str(path)!r} begins at "
            f"{info.batch[0]}; build it with another `batch`."
        )
    onnx = path.with_name(info.onnx)
    if not onnx.is_file() or sha256(onnx) != info.onnx_sha256:
        raise FileNotFoundError(
            f"Expected {str(onnx)!r}, from which {str(path)!r} was built, but it is not there or "
            "another one; it says what goes in and out."
        )
    return onnx


def _refuse_external_data(graph: ir.Graph, path: Path) -> None:
    held = (value.const_value for value in graph.initializers.values())
    if any(isinstance(tensor, ir.ExternalTensor) for tensor in held):
        raise ValueError(
            f"Expected all weights within {str(path)!r}, but some lie in another file; save it "
            "with them inside."
        )


def _check(
    name: str, version: int, max_batch_size: int, queue_delay_us: int, instances: int, device: str
) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"Expected `name` to be one of a folder, of letters, digits, '_', '-' and '.', but got "
            f"{name!r}."
        )
    counts = {"version": version, "max_batch_size": max_batch_size, "instances": instances}
    for argument, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"Expected `{argument}` to be at least 1, but got {count}.")
    if queue_delay_us < 0:
        raise ValueError(f"Expected `queue_delay_us` to be at least 0, but got {queue_delay_us}.")
    if device not in DEVICES:
        raise ValueError(
            f"Expected `device` to be one of {', '.join(DEVICES)}, but got {device!r}; "
            f"{suggest(device, DEVICES)}"
        )
