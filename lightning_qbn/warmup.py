"""The learning-rate schedule of the recipe. It needs torch alone: the study's other environments read this file too."""

from __future__ import annotations

import math

import torch

WARMUP = 0.05  # share of the steps


def warmup_cosine(
    optimizer: torch.optim.Optimizer, total_steps: int, warmup: float = WARMUP
) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear rise over a share ``warmup`` of the steps, then a cosine to 0; stepped after every optimizer step."""
    rising = max(1, int(warmup * total_steps))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        left = total_steps - step
        return 0.5 * (1 - math.cos(math.pi * left / (total_steps - rising))) if left > 0 else 0.0

    return _ByStep(optimizer, factor)


class _ByStep(torch.optim.lr_scheduler.LambdaLR):
    """Counts its calls, whatever epoch a module's own ``lr_scheduler_step`` passes."""

    def step(self, *_: object, **__: object) -> None:
        super().step()
