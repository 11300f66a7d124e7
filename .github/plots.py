"""python .github/plots.py: draw labels.png and masking.png from EXPERIMENTS.md's tables. Needs matplotlib."""

from math import nan
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent


def draw(axes, title, x_label, y_label, ticks, lines):
    """Draw lines with error bars. lines: name -> (values, sizes of the error bars; nan or None: no bar)."""
    for name, (values, errors) in lines.items():
        axes.errorbar(ticks, values, errors, marker="o", capsize=3, label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y")
    axes.legend()


labels = {
    "LOCA": ([37.5, 39.5, 39.6, 37.7], [3.0, 1.1, nan, nan]),
    "from scratch": ([23.6, 24.2, 22.8, 23.0], [1.3, 0.8, nan, nan]),
}
figure, axes = plt.subplots(figsize=(6, 3.5), layout="tight")
title = "Segmentation by number of labels, 400 steps"
draw(axes, title, "fraction of the 367 labeled images", "mIoU, %", ["1/8", "1/4", "1/2", "all"], labels)
figure.savefig(HERE / "labels.png", dpi=80)

loss = {
    "with a reference": ([3.80, 3.84, 3.88, 3.88], None),
    "single image": ([3.68, 3.76, 3.87, 3.97], None),
}
miou = {  # mean of two seeds; the ends of each error bar are the two seeds
    "with a reference": ([26.6, 25.9, 27.95, 25.1], [1.3, 1.0, 0.05, 0.4]),
    "single image": ([26.0, 25.55, 25.05, 23.4], [0.1, 1.55, 1.75, 0.4]),
}
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="tight")
ratios = ["0", "0.4", "0.8", "0.95"]
draw(left, "Pretraining", "masking ratio", "position loss (chance 4.16)", ratios, loss)
draw(right, "Segmentation, two seeds", "masking ratio", "mIoU, %", ratios, miou)
figure.savefig(HERE / "masking.png", dpi=80)
