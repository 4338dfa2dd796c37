"""Build a TensorRT engine from an ONNX file, with TensorRT or TensorRT-RTX, whichever is there."""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx_ir as ir
import torch

from lq.export.inspector import (
    BuiltLayer,
    built_formats,
    fused,
    parse_build_log,
    parse_inspector,
)
from lq.export.plan import read_plan
from lq.export.shapes import IMAGE_AXES
from lq.files import sha256, write_text, written_whole

log = logging.getLogger(__name__)
BUILDERS = ("tensorrt", "tensorrt_rtx")
INSTALL = (
    "neither tensorrt nor tensorrt-rtx is installed; install one: pip install tensorrt (the extra "
    "tensorrt; data center and Jetson GPUs) or pip install tensorrt-rtx (the extra rtx; RTX GPUs)."
)


def find_builder() -> ModuleType | None:
    """Return the TensorRT module that is installed, ``tensorrt`` first, or ``None``."""
    for name in BUILDERS:
        try:
            return importlib.import_module(name)
        except (ImportError, OSError):  # OSError: the package without its CUDA libraries
            continue
    return None


@dataclass(frozen=True)
class EngineInfo:
    """What an engine is and where it runs; its JSON sidecar.

    Attributes:
        builder: Module that built it, with its version.
        compute_capability: What it was built for: ``SM89``, or that of the GPU at hand.
        onnx: Name of the ONNX file.
        onnx_sha256: Its hash.
        inputs: Name -> shape, -1 where it varies.
        outputs: Name -> shape.
        batch: Smallest, best and largest batch.
        image: Smallest, best and largest height and width, ``None`` where they are fixed.
        formats: Layer -> format, as the graph says.
        built_formats: Layer -> format in which the engine multiplies, as it says itself; ``"?"``
            where it does not.
        layers: The engine's own layers, with the ONNX nodes that each computes.
        engine_sha256: Hash of the engine.
        size_mb: Size of the engine, in 10^6 bytes.
        build_s: Seconds the build took.
    """

    builder: str
    compute_capability: str
    onnx: str
    onnx_sha256: str
    inputs: dict[str, list[int]]
    outputs: dict[str, list[int]]
    batch: tuple[int, int, int]
    image: tuple[int, int, int] | None
    formats: dict[str, str]
    built_formats: dict[str, str]
    layers: list[BuiltLayer]
    engine_sha256: str
    size_mb: float
    build_s: float

    @property
    def fallbacks(self) -> dict[str, str]:
        """Layers that the engine computes in another format than the graph says: format built.

        A layer of weights alone, ``int8/fp32``, multiplies in the second format.
        """
        return {
            name: self.built_formats[name]
            for name, planned in self.formats.items()
            if self.built_formats[name] not in ("?", planned.rpartition("/")[2])
        }

    def summary(self) -> str:
        """Return the report in a line."""
        counts = Counter(self.built_formats.values())
        formats = ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))
        fell = "; ".join(
            f"{name} planned {self.formats[name]}, built {built}"
            for name, built in self.fallbacks.items()
        )
        return (
            f"{self.size_mb:.2f} MB for {self.compute_capability} by {self.builder} in "
            f"{self.build_s:.1f} s; {len(self.formats)} layers that multiply: {formats}; "
            f"{len(fused(self.layers))} fused kernels; "
            + (f"fell back: {fell}" if fell else "none fell back")
        )

    @classmethod
    def load(cls, engine: str | Path) -> EngineInfo:
        """Return what the sidecar of an engine says."""
        values = json.loads(cls.path_of(engine).read_text(encoding="utf-8"))
        values["layers"] = [BuiltLayer(**_tuples(layer)) for layer in values["layers"]]
        return cls(**_tuples(values, ("batch", "image")))

    @staticmethod
    def path_of(engine: str | Path) -> Path:
        """Return where the sidecar of an engine lies."""
        return Path(f"{engine}.json")


def _tuples(
    values: dict[str, Any], names: tuple[str, ...] = ("inputs", "outputs", "onnx")
) -> dict[str, Any]:
    """Return values read from JSON, with the lists under some names as the tuples they were."""
    return {k: tuple(v) if k in names and v is not None else v for k, v in values.items()}


def build_engine(
    onnx: str | Path,
    path: str | Path,
    batch: tuple[int, int, int] = (1, 16, 64),
    compute_capability: str | None = None,
    image: tuple[int, int, int] | None = None,
) -> EngineInfo:
    """Build a strongly typed engine from an ONNX file.

    Every layer runs in the type the graph gives it. Beside the engine a JSON sidecar says what
    built it, for which GPU, from which file, and what became of each layer. TensorRT keeps a
    timing cache beside it, so that the next build is faster and picks the same kernels.

    Args:
        onnx: An ONNX file.
        path: Where to write the engine.
        batch: Smallest, best and largest batch, for inputs whose first axis varies.
        compute_capability: GPU to build for, such as ``"SM89"``. TensorRT-RTX builds for it with
            no GPU at hand; ``None`` is the GPU at hand, or SM89 where there is none.
        image: Smallest, best and largest height and width, for inputs in which they vary (see
            ``dynamic_image`` of ``export_onnx``).

    Raises:
        FileNotFoundError: If there is no ONNX file.
        ImportError: If no builder is installed, naming the extras.
        RuntimeError: If the file cannot be parsed or built, with the builder's own reason.
        ValueError: If `batch` or `image` is no range, or an axis varies that has none.
    """
    if not Path(onnx).is_file():
        raise FileNotFoundError(f"Expected an ONNX file at {str(onnx)!r}, but there is no file.")
    for name, sizes in (("batch", batch), ("image", image)):
        if sizes is not None and not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise ValueError(f"Expected `{name}` as smallest <= best <= largest, but got {sizes}.")
    trt = find_builder()
    if trt is None:
        raise ImportError(f"Cannot build an engine: {INSTALL}")
    started = time.perf_counter()
    build = _Build(trt, Path(onnx))
    capability = build.set_capability(compute_capability)
    build.set_profile(batch, image)
    timing = Path(f"{path}.timing")
    build.load_timing_cache(timing)
    formats = read_plan(ir.load(onnx))
    with written_whole(path) as temporary:
        plan = build.serialized()
        temporary.write_bytes(plan)
        layers = build.layers(plan)
        info = EngineInfo(
            builder=f"{trt.__name__} {trt.__version__}",
            compute_capability=capability,
            onnx=Path(onnx).name,
            onnx_sha256=sha256(onnx),
            inputs=build.shapes(inputs=True),
            outputs=build.shapes(inputs=False),
            batch=batch,
            image=image,
            formats=formats,
            built_formats=built_formats(layers, formats),
            layers=layers,
            engine_sha256=sha256(temporary),
            size_mb=len(plan) / 1e6,
            build_s=time.perf_counter() - started,
        )
        write_text(EngineInfo.path_of(path), json.dumps(asdict(info), indent=2))
    build.save_timing_cache(timing)
    return info


class _Build:
    """One parse and build; the calls that ``tensorrt`` and ``tensorrt_rtx`` share."""

    def __init__(self, trt: ModuleType, onnx: Path) -> None:
        self.trt = trt
        self.logger = logger(trt)
        self.logger.recent, self.logger.layers = [], ""
        self.builder = trt.Builder(self.logger)
        # TensorRT 10 needs the flag, 11 and RTX build nothing else.
        flag = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(flag)
        self.parser = trt.OnnxParser(self.network, self.logger)
        if not self.parser.parse_from_file(str(onnx)):
            errors = [str(self.parser.get_error(i)) for i in range(self.parser.num_errors)]
            raise RuntimeError(f"{trt.__name__} cannot parse {str(onnx)!r}: {'; '.join(errors)}")
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED

    def set_capability(self, wanted: str | None) -> str:
        """Choose the GPU to build for; only RTX can choose one that is not at hand."""
        at_hand = capability_at_hand()
        if not hasattr(self.config, "set_compute_capability"):
            if at_hand is None:
                raise RuntimeError("tensorrt builds on the GPU it builds for, and there is none.")
            if wanted not in (None, at_hand):
                raise ValueError(f"tensorrt builds for the GPU at hand, {at_hand}, not {wanted!r}.")
            return at_hand
        known = {name for name in vars(self.trt.ComputeCapability) if name.startswith("SM")}
        name = wanted or (at_hand if at_hand is not None and at_hand in known else "SM89")
        if name not in known:
            raise ValueError(
                f"Expected `compute_capability` to be one of {', '.join(sorted(known))}, "
                f"but got {name!r}."
            )
        self.config.num_compute_capabilities = 1
        self.config.set_compute_capability(getattr(self.trt.ComputeCapability, name), 0)
        return name

    def set_profile(self, batch: tuple[int, int, int], image: tuple[int, int, int] | None) -> None:
        """Declare the sizes that axes of inputs may have where they vary."""
        ranges = {0: batch} if image is None else {0: batch} | dict.fromkeys(IMAGE_AXES, image)
        profile = self.builder.create_optimization_profile()
        varies = False
        for name, shape in self.shapes(inputs=True).items():
            varying = [axis for axis, size in enumerate(shape) if size == -1]
            if not set(varying) <= set(ranges):
                raise ValueError(
                    f"Expected only the axes {list(ranges)} of input {name!r} to vary, but got "
                    f"{shape}; give `image` if height and width do."
                )
            if varying:
                varies = True
                bounds = [{axis: ranges[axis][i] for axis in varying} for i in range(3)]
                profile.set_shape(
                    name, *([b.get(axis, size) for axis, size in enumerate(shape)] for b in bounds)
                )
        if varies and self.config.add_optimization_profile(profile) < 0:
            raise RuntimeError(f"{self.trt.__name__} refuses batches {batch}, images {image}.")

    def shapes(self, inputs: bool) -> dict[str, list[int]]:
        """Return the network's inputs or outputs by name."""
        network = self.network
        if inputs:
            tensors = [network.get_input(i) for i in range(network.num_inputs)]
        else:
            tensors = [network.get_output(i) for i in range(network.num_outputs)]
        return {tensor.name: list(tensor.shape) for tensor in tensors}

    def load_timing_cache(self, path: Path) -> None:
        """Start from the kernels an earlier build chose."""
        if self._has_timing_cache():
            blob = path.read_bytes() if path.is_file() else b""
            self.config.set_timing_cache(self.config.create_timing_cache(blob), False)

    def save_timing_cache(self, path: Path) -> None:
        """Keep the kernels this build chose."""
        if self._has_timing_cache():
            with written_whole(path) as temporary:
                temporary.write_bytes(bytes(self.config.get_timing_cache().serialize()))

    def _has_timing_cache(self) -> bool:
        # RTX chooses kernels when the engine is loaded; its calls do nothing but warn.
        return bool(self.trt.__name__ == "tensorrt")

    def serialized(self) -> bytes:
        """Return the engine.

        Raises:
            RuntimeError: With what the builder logged.
        """
        plan = self.builder.build_serialized_network(self.network, self.config)
        if plan is None:
            raise RuntimeError(f"{self.trt.__name__} cannot build: {self.logger.errors()}")
        return bytes(plan)

    def layers(self, plan: bytes) -> list[BuiltLayer]:
        """Return the layers of an engine as its inspector tells, or where it cannot the log."""
        runtime = self.trt.Runtime(self.logger) if torch.cuda.is_available() else None
        engine = runtime.deserialize_cuda_engine(plan) if runtime is not None else None
        if engine is None:  # no GPU, or another than it was built for
            return parse_build_log(self.logger.layers)
        inspector = engine.create_engine_inspector()
        return parse_inspector(
            inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        )


_LOGGERS: dict[str, Any] = {}


def logger(trt: ModuleType) -> Any:
    """Return the one logger a process may have, which passes warnings on to ``logging``."""
    if trt.__name__ in _LOGGERS:
        return _LOGGERS[trt.__name__]

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.recent: list[str] = []
            self.layers = ""
            """What the last build said of its layers."""

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.recent = [*self.recent[-9:], message]
            elif severity == trt.ILogger.WARNING:
                log.warning("%s: %s", trt.__name__, message)
            elif message.startswith("Layers:"):
                self.layers = message

        def errors(self) -> str:
            # Without a GPU every error is followed by one about the missing driver.
            told = [m for m in self.recent if "catchCudaError" not in m]
            return "; ".join(told) or "no reason given"

    _LOGGERS[trt.__name__] = Logger()
    return _LOGGERS[trt.__name__]


def capability_at_hand() -> str | None:
    """Return the compute capability of the GPU here, such as ``SM89``, ``None`` without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"SM{major}{minor}"
