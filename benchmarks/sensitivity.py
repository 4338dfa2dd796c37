"""What a sweep costs in forward passes, and whether the cheap methods find what the exact one does.

The passes are seconds over those of a float pass on the same batch, medians of interleaved runs in
one process: --passes resnet18 mobilenet_v2 vit_b_16, with nvidia-modelopt where it is installed.
The rankings are of published models on real images (LQ_DATA), or of digits without them:
--rank resnet20 mobilenet_v2_cifar. python benchmarks/sensitivity.py [--passes ...] [--rank ...]
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from shared import CASES, FOLDER, batches, trained_digits
from torch import Tensor, nn

import lq
from lq.data import DigitsDataModule
from lq.modes import eval_mode, quantizer_mode
from lq.sensitivity import Sensitivity
from lq.sensitivity.exact import Exact, Variant
from lq.sensitivity.gradient import Gradient
from lq.sensitivity.journal import Journal
from lq.sensitivity.states import States
from lq.sensitivity.units import find_units
from lq.surgery import quantized_layers

Batch = tuple[Tensor, Tensor]
TOP = 10
DIGITS = "digits"


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of a run, which other processes do not count in."""
    started = time.process_time()
    run()
    return time.process_time() - started


def naive(model: nn.Module, batch: Batch, units: dict[str, tuple[str, ...]]) -> Callable[[], None]:
    """Return what measures every unit by a whole pass, and the float model once."""
    quantized = lq.quantize(copy.deepcopy(model), "tensorrt_int8")
    lq.calibrate(quantized, [batch], progress=False)
    layers = quantized_layers(quantized)

    def run() -> None:
        with eval_mode(quantized), quantizer_mode(quantized, lq.Mode.BYPASS):
            quantized(batch[0])
            for names in units.values():
                found = [q for n in names for q in own(layers[n])]
                for quantizer in found:
                    quantizer.mode = lq.Mode.QUANTIZE
                quantized(batch[0])
                for quantizer in found:
                    quantizer.mode = lq.Mode.BYPASS

    return run


def own(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.input_quantizer, layer.weight_quantizer


@contextmanager
def metered(method: type[Exact | Gradient], states: States, batch: Batch) -> Iterator[Any]:
    """Give what measures all units of a batch, which was looked at before."""
    units = find_units(states.dataflow, states.layers)
    variants = [Variant(format, "both", unit) for unit in units for format in states.recipes]
    with method(states, units, variants, Journal(None, {})) as meter:
        meter.probe(batch)
        yield meter


def ours(model: nn.Module, batch: Batch, formats: list[str], method: Any) -> Callable[[], float]:
    """Return what measures all units of one batch, and says how long it took."""
    states = States(model, lq.Recipe(), formats, [batch], progress=False)
    count = iter(range(1000))

    def run() -> float:
        with eval_mode(model), metered(method, states, batch) as meter:
            return seconds(lambda: meter.measure(next(count), batch, meter.variants))

    return run


def modelopt(model: nn.Module, batch: Batch, method: str) -> Callable[[], float]:
    """Return what runs modelopt's scoring on one batch, and says how long that took."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import algorithms

    searcher = {
        "kl_div": algorithms.AutoQuantizeKLDivSearcher,
        "gradient": algorithms.AutoQuantizeGradientSearcher,
    }[method]
    score, taken = searcher.estimate_sensitivity_scores, []
    gradient = {"loss_func": lambda y, b: nn.functional.cross_entropy(y, b[1])}

    def run() -> float:
        searcher.estimate_sensitivity_scores = lambda self: taken.append(
            seconds(lambda: score(self))
        )
        try:
            mtq.auto_quantize(
                copy.deepcopy(model),
                constraints={"effective_bits": 12.0},
                quantization_formats=[mtq.INT8_DEFAULT_CFG],
                data_loader=[batch],
                forward_step=lambda net, b: net(b[0]),
                num_calib_steps=1,
                num_score_steps=1,
                method=method,
                **(gradient if method == "gradient" else {}),
            )
        finally:
            searcher.estimate_sensitivity_scores = score
        return taken[-1]

    return run


def passes(name: str, samples: int, rounds: int, peers: bool) -> None:
    """Print how many forward passes each method takes for all units of a model."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    batch = torch.randn(samples, 3, 224, 224), torch.randint(0, 1000, (samples,))
    units = find_units(*_parts(model))
    whole = naive(model, batch, units)
    runs: dict[str, Callable[[], float]] = {
        "naive": lambda: seconds(whole),
        "replay": ours(model, batch, ["int8"], Exact),
        "replay, int8 and fp16": ours(model, batch, ["int8", "fp16"], Exact),
        "gradient": ours(model, batch, ["int8"], Gradient),
    }
    if peers:
        runs |= {f"modelopt {m}": modelopt(model, batch, m) for m in ("kl_div", "gradient")}

    def forward() -> None:
        with eval_mode(model):
            model(batch[0])

    taken: dict[str, list[float]] = {key: [] for key in runs}
    floats: list[float] = []
    seconds(forward)
    for _ in range(rounds):
        for key, run in runs.items():
            floats.append(seconds(forward))
            taken[key].append(run())
    unit = statistics.median(floats)
    found = {key: statistics.median(times) / unit for key, times in taken.items()}
    print(f"{name}, {len(units)} units, batch {samples}, forward passes:")
    for key, value in found.items():
        print(f"  {key:22s} {value:6.2f}   {found['naive'] / value:5.2f}x faster than naive")


def _parts(model: nn.Module) -> tuple[Any, Any]:
    states = States(model, lq.Recipe(), ["fp16"], [], progress=False)
    return states.dataflow, states.layers


def data(name: str, images: int) -> tuple[nn.Module, list[Batch], list[Batch]]:
    """Return a float model, batches to measure on, and batches to calibrate with."""
    if name != DIGITS:
        case = CASES[name]
        tested = list(batches(case.data("test", images), 32))
        return case.model(), tested, list(batches(case.data("train", 256), 64))
    digits = DigitsDataModule(batch_size=32)
    model = trained_digits(digits, epochs=5)
    return model, list(digits.val_dataloader()), list(digits.calibration_dataloader())


def rank(name: str, images: int, formats: list[str]) -> None:
    """Print how well the cheap methods rank, and what they cost."""
    model, tested, calibration = data(name, images)
    with tempfile.TemporaryDirectory() as folder:

        def swept(method: str, metric: str) -> Sensitivity:
            return lq.sweep(
                model,
                tested,
                formats,
                method,
                metric,
                calibration=calibration,
                journal=f"{folder}/{method == 'gradient'}.jsonl",
                progress=False,
            )

        exact, estimate = swept("exact", "kl"), swept("gradient", "kl")
        print(f"{name}, {exact.n} images, float top-1 {exact.top1:.2%}, {len(exact.units)} units")
        for format in formats:
            found = exact.rank_correlation(estimate, format)
            print(f"  {format}: rank correlation of gradient with exact, by kl: {found:.3f}")
        top = min(TOP, len(exact.units) // 2)
        for metric in ("kl", "loss", "sqnr", "top1"):
            full, quick = swept("exact", metric), swept("adaptive", metric)
            noise = sum(row.noise for row in full)
            share = quick.passes / full.passes
            for format in formats:
                names = [{row.layer for row in s.ranked(format)[:top]} for s in (full, quick)]
                print(
                    f"  adaptive by {metric}, {format}: {len(names[0] & names[1])} of the same "
                    f"top {top} with {share:.0%} of the work ({noise} of {len(full)} are noise)"
                )
        print(exact.table(rows=5), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    real = (FOLDER / "weights").is_dir()
    parser.add_argument("--passes", nargs="*", default=["resnet18", "mobilenet_v2", "vit_b_16"])
    parser.add_argument("--rank", nargs="*", default=["resnet20"] if real else [DIGITS])
    parser.add_argument("--formats", nargs="+", default=["int8"])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peers", action="store_true")
    given = parser.parse_args()
    for name in given.passes:
        passes(name, given.batch, given.rounds, not given.no_peers)
    for name in given.rank:
        rank(name, given.images, given.formats)


if __name__ == "__main__":
    main()
