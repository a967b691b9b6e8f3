"""The float networks, and the float control: as many steps of the same training without a quantizer."""

from __future__ import annotations

from pathlib import Path

import torch
from common import PEAK, Data, Job, accuracy, batches, build, load_float, train, warmup_cosine


def run(job: Job, data: Data, folder: Path) -> dict[str, float]:
    """Train from the start (method ``start``), or go on from there."""
    if job.method == "start":
        network = build(job.network)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), PEAK)
        scheduler = warmup_cosine(optimizer, job.steps)
    else:
        network = load_float(job.network, folder)
        optimizer = torch.optim.SGD(network.parameters(), job.lr, momentum=0.9)
        scheduler = warmup_cosine(optimizer, job.steps)
    train(network.train(), optimizer, scheduler, batches(data.train, job.seed, job.steps))
    network.eval()
    found = {"validation": accuracy(network, data.validation)}
    if job.method == "start":
        torch.save(network.state_dict(), folder / f"{job.network}.pt")
    if job.test:
        found["test"] = accuracy(network, data.test)
    return found
