"""Draw the README's picture from a finished quickstart: python benchmarks/readme_picture.py."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RUN = Path("runs/quickstart")
BLUE, ORANGE, GRAY = "#0072B2", "#D55E00", "#666666"  # told apart by colour-blind readers too


def main() -> None:
    """Write docs/quickstart.png."""
    log = max(RUN.glob("version_*"), key=lambda p: int(p.name.split("_")[1]))
    events = EventAccumulator(str(log)).Reload()
    rows = json.loads((RUN / "digits.json").read_text())["rows"]
    tags = [t for t in events.Tags()["scalars"] if t.endswith("input_quantizer/sqnr_db")]
    start = events.Scalars(tags[0])[0].step
    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 3.2), width_ratios=[1.2, 1.2, 0.8], layout="constrained"
    )
    curve = events.Scalars("val/top1")
    left.plot([e.step for e in curve], [100 * e.value for e in curve], "o-", color=BLUE, ms=4)
    left.axvspan(start, curve[-1].step, color=ORANGE, alpha=0.15, lw=0)
    left.set_ylim(top=100)
    low = left.get_ylim()[0]
    left.text(start / 2, low + 0.5, "float", ha="center", color=GRAY)
    left.text((start + curve[-1].step) / 2, low + 0.5, "INT8 (QAT)", ha="center", color=ORANGE)
    left.set(title="Validation top-1, %", xlabel="training step")
    for tag in tags:
        points = events.Scalars(tag)
        name = tag.split("/")[1].removesuffix(".input_quantizer")
        middle.plot([e.step for e in points], [e.value for e in points], label=f"layer {name}")
    middle.legend(fontsize=8, frameon=False, ncols=2)
    middle.margins(y=0.25)
    middle.set(title="SQNR of layer inputs, dB", xlabel="training step")
    names = ["float file", "INT8 file"]
    sizes = [1000 * rows[name]["size_mb"] for name in names]
    bars = right.bar(["float", "INT8"], sizes, color=[BLUE, ORANGE], width=0.6)
    labels = [f"{s:.0f} kB\n{rows[n]['top1']:.2%}" for s, n in zip(sizes, names, strict=True)]
    right.bar_label(bars, labels, fontsize=10)
    right.set_ylim(top=1.35 * max(sizes))
    right.set(title="ONNX file and top-1", yticks=[])
    right.spines["left"].set_visible(False)
    figure.savefig("docs/quickstart.png", dpi=120)


if __name__ == "__main__":
    main()
