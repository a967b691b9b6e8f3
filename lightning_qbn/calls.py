"""Notice code that no graph shows and that calls single layers of a traced network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_qbn.layers import WeightQuantized
from lightning_qbn.operations import is_norm
from lightning_qbn.rewriting import Rewritten


@contextmanager
def watching_calls(network: nn.Module) -> Iterator[None]:
    """Note on every weight layer and batch-norm whether it is called otherwise than by the graphs, in evaluation mode.

    Such a layer must not take in the batch-norm behind it, however clear the graphs are.
    """
    counts: Counter[nn.Module] = Counter()

    def count(module: nn.Module, args: Any) -> None:
        counts[module] += 1

    modules = [m for m in network.modules() if not isinstance(m, torch.jit.ScriptModule)]  # these take no hooks
    layers = [m for m in modules if isinstance(m, WeightQuantized) or is_norm(m)]
    rewritten = [m for m in network.modules() if isinstance(m, Rewritten)]
    handles = [module.register_forward_pre_hook(count) for module in (*layers, *rewritten)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    expected: Counter[nn.Module] = Counter()
    shown: set[nn.Module] = set()
    for module in rewritten:
        for node in module.programs[1].graph.nodes if module.programs[1] else ():
            if node.op == "call_module":
                called = module.get_submodule(str(node.target))
                shown.add(called)
                expected[called] += counts[module]
    for layer in shown.intersection(layers):
        layer.__dict__["called_outside"] = counts[layer] != expected[layer]
