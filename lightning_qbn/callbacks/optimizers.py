"""Learned scales, and zero points, get a parameter group of their own in the optimizer that the user configured.

They are never weight-decayed, and may have their own learning rate. Schedulers were made for the groups
that were there before, so every list that they keep by group gets one more entry.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_qbn.fake_quantize import quantizers

# What the schedulers of torch.optim.lr_scheduler keep with one entry per parameter group.
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "max_lrs", "min_lrs", "base_momentums", "max_momentums")


def separate_scales(
    network: nn.Module, optimizers: list[Optimizer], schedulers: list[Any], scale_lr: float | None
) -> list[str]:
    """Move the learned scales of a network out of their groups into one of their own.

    LBFGS keeps those that it has. Scales that no optimizer holds go to the one that holds the most parameters of the
    network.

    Args:
        network: with quantizers.
        optimizers: all of them.
        schedulers: learning-rate schedulers of these optimizers.
        scale_lr: learning rate of the scales; None: that of the group they were in.

    Returns:
        Names of scales that no optimizer will train, because there is none.
    """
    scales = {id(p): (name, p) for name, q in quantizers(network).items() for p in q.parameters()}
    taken: set[int] = set()
    optimizers = [optimizer for optimizer in optimizers if optimizer.param_groups]
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):  # it takes one group, and knows no weight decay
            taken |= {id(p) for p in optimizer.param_groups[0]["params"]}
    optimizers = [optimizer for optimizer in optimizers if not isinstance(optimizer, torch.optim.LBFGS)]
    for optimizer in optimizers:
        inside = [p for group in optimizer.param_groups for p in group["params"] if id(p) in scales]
        taken |= {id(p) for p in inside}
        if inside:
            _move(optimizer, inside, schedulers, scale_lr)
    left = {key: entry for key, entry in scales.items() if key not in taken}
    if left and optimizers:
        own = {id(p) for p in network.parameters()}
        most = max(optimizers, key=lambda o: sum(id(p) in own for g in o.param_groups for p in g["params"]))
        _move(most, [parameter for _, parameter in left.values()], schedulers, scale_lr)
        return []
    return [name for name, _ in left.values()]


def _move(optimizer: Optimizer, scales: list[Any], schedulers: list[Any], scale_lr: float | None) -> None:
    moving = {id(p) for p in scales}
    held = [sum(id(p) in moving for p in group["params"]) for group in optimizer.param_groups]
    index = held.index(max(held))
    model = optimizer.param_groups[index]
    names: dict[int, str] = {}
    for group in optimizer.param_groups:
        if "param_names" in group:  # the optimizer was made from named_parameters()
            named = list(zip(group["params"], group["param_names"], strict=True))
            names |= {id(p): name for p, name in named}
            group["param_names"] = [name for p, name in named if id(p) not in moving]
        group["params"] = [p for p in group["params"] if id(p) not in moving]
    base = model.get("initial_lr", model["lr"])

    def own(rate: Any) -> Any:
        """A learning rate of the scales from one of the group that they were in."""
        if scale_lr is None:
            return rate
        return rate * (scale_lr / base) if base else scale_lr

    rates = {key: own(model[key]) for key in ("lr", "initial_lr", "max_lr", "min_lr") if key in model}
    settings = {key: value for key, value in model.items() if key != "param_names"} | rates
    params = [(names.get(id(p), f"scale_{i}"), p) for i, p in enumerate(scales)] if names else scales
    optimizer.add_param_group({**settings, "params": params, "weight_decay": 0.0})
    for scheduler in _flatten(schedulers):
        if getattr(scheduler, "optimizer", None) is optimizer:
            for name in _PER_GROUP:
                entries = getattr(scheduler, name, None)
                if isinstance(entries, list) and len(entries) == len(held):
                    scaled = "lr" in name and name != "lr_lambdas"
                    entries.append(own(entries[index]) if scaled else entries[index])


def _flatten(schedulers: list[Any]) -> list[Any]:
    """Schedulers and those inside SequentialLR and ChainedScheduler."""
    return [one for scheduler in schedulers for one in (scheduler, *_flatten(getattr(scheduler, "_schedulers", [])))]
