"""Error of re-estimated statistics and accuracy, by number of batches, batch size, estimator, mode and order.

Fashion-MNIST, a MobileNetV2-like network with 3-bit weights, three seeds; about half an hour on one core::

    python docs/studies/batch_norm_statistics.py --json study.json >tables.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path

import lightning as L  # noqa: N812
import torch
from torch import Tensor, nn

import lightning_qbn as qbn
from lightning_qbn.demo.data import FashionMNIST
from lightning_qbn.demo.module import Classifier
from lightning_qbn.demo.networks import MobileNet

JOINT, JOINT_POPULATION = ("joint", "mean_of_batches"), ("joint", "population")
SEQUENTIAL_MEAN, SEQUENTIAL = ("sequential", "mean_of_batches"), ("sequential", "population")
TRAINER = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
REFERENCE = 10_000  # images, other than those of the samples

# Table to rows: (label, batch size, number of batches, sorted by class).
TABLES: dict[str, list[tuple[str, int, int, bool]]] = {
    "Number of batches of 64": [(str(n), 64, n, False) for n in (1, 2, 5, 10, 50)],
    "Batch size, 1,280 images": [(str(size), size, 1280 // size, False) for size in (2, 4, 8, 16, 64, 256)],
    "Order, 20 batches of 64": [("shuffled", 64, 20, False), ("sorted by class", 64, 20, True)],
}
WAYS = (JOINT, JOINT_POPULATION, SEQUENTIAL_MEAN, SEQUENTIAL)


def trained(seed: int, epochs: int, train_size: int) -> tuple[nn.Module, FashionMNIST]:
    """A network after one epoch with 3-bit weights, its running statistics as training left them."""
    L.seed_everything(seed, verbose=False)
    data = FashionMNIST(batch_size=64, train_size=train_size, seed=seed)
    network = MobileNet(strides=(2, 2, 2))
    trainer = partial(L.Trainer, **TRAINER, enable_progress_bar=False, limit_val_batches=0)
    trainer(max_epochs=epochs).fit(Classifier(network, optimizer=partial(torch.optim.Adam, lr=0.005)), data)
    config = qbn.QuantizationConfig(3, 8, overrides={"*stem*": {"weight_bits": 8}, "*head*": {"weight_bits": 8}})
    module = Classifier(network, optimizer=partial(torch.optim.SGD, lr=0.033, momentum=0.9))
    trainer(max_epochs=1, callbacks=[qbn.QuantizationAwareTraining(config)]).fit(module, data)
    return network.eval(), data


def statistics_of(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copies of all running means and variances."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    return [(m.running_mean.double().clone(), m.running_var.double().clone()) for m in norms]


def errors(found: list[tuple[Tensor, Tensor]], reference: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean over channels of the errors of the mean, in sigmas, and of the variance, relative."""
    means = [(m - r).abs() / v.sqrt() for (m, _), (r, v) in zip(found, reference, strict=True)]
    variances = [(v - r).abs() / r for (_, v), (_, r) in zip(found, reference, strict=True)]
    return float(torch.cat(means).mean()), float(torch.cat(variances).mean())


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that are classified rightly."""
    with torch.no_grad():
        right = [
            int((network(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        ]
    return sum(right) / len(labels)


def study(seed: int, epochs: int, train_size: int) -> dict[str, list[float]]:
    """For every way and row: error of the mean, error of the variance, accuracy."""
    network, data = trained(seed, epochs, train_size)
    images, labels = data.splits["train"].tensors
    test = data.splits["test"].tensors
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    sample, others = mixed[: train_size - REFERENCE], mixed[train_size - REFERENCE :]
    found: dict[str, list[float]] = {}
    stale = statistics_of(network)
    with qbn.reestimate_batch_norms(network, images[others].split(500), 99, "sequential"):
        reference = statistics_of(network)
        found["reference"] = [0.0, 0.0, accuracy(network, *test)]
    found["running statistics of training"] = [*errors(stale, reference), accuracy(network, *test)]
    for table, rows in TABLES.items():
        for label, size, count, by_class in rows:
            chosen = sample[: size * count]
            order = chosen[labels[chosen].argsort(stable=True)] if by_class else chosen
            for mode, estimator in WAYS:
                with qbn.reestimate_batch_norms(network, images[order].split(size), count, mode, estimator):
                    now = [*errors(statistics_of(network), reference), accuracy(network, *test)]
                found[f"{table}/{label}/{mode}/{estimator}"] = now
        print(f"seed {seed}: {table}", file=sys.stderr)
    return found


def cell(values: list[list[float]]) -> str:
    """Errors of mean and variance, and accuracy with its deviation, over seeds."""
    mean, variance, right = (list(column) for column in zip(*values, strict=True))
    spread = f" ± {statistics.stdev(right):.1%}" if len(right) > 1 else ""
    return f"{statistics.mean(mean):.4f} / {statistics.mean(variance):.4f} / {statistics.mean(right):.1%}{spread}"


def tables(results: dict[str, list[list[float]]]) -> str:
    """All of it in Markdown; each cell: error of the mean / error of the variance / accuracy."""
    lines = [f"- {name}: {cell(results[name])}" for name in ("running statistics of training", "reference")]
    for table, rows in TABLES.items():
        heads = " | ".join(f"{mode}, {estimator}" for mode, estimator in WAYS)
        lines += ["", f"### {table}", "", f"| | {heads} |", "|---" * (len(WAYS) + 1) + "|"]
        for label, *_ in rows:
            cells = [cell(results[f"{table}/{label}/{mode}/{estimator}"]) for mode, estimator in WAYS]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all seeds, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3, help="of float training")
    parser.add_argument("--train-size", type=int, default=30_000, help="images")
    parser.add_argument("--json", type=Path, help="file for the numbers of every seed")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, list[list[float]]] = defaultdict(list)
    for seed in options.seeds:
        for name, values in study(seed, options.epochs, options.train_size).items():
            results[name].append(values)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    print(tables(results))


if __name__ == "__main__":
    main()
