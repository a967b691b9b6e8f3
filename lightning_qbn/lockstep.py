"""All batches pass through a network at once, and wait for each other in front of every batch-norm.

So every batch-norm gets the statistics of all batches before any of them goes on: the inference graph's own
statistics, for the price of one pass. A batch that waits keeps what is alive in its pass. Where that is too
much it goes back to the call of a module around the layer, keeps that module's arguments only, and comes
again when the statistics are there.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from contextvars import copy_context
from typing import Any

import torch
from greenlet import GreenletExit, greenlet
from torch import Tensor, nn

from lightning_qbn.collection import Layer, refuse_empty, watched
from lightning_qbn.errors import ReestimationError
from lightning_qbn.interleaving import StateOfPasses
from lightning_qbn.passes import ForwardFn, copied, forward
from lightning_qbn.waiting import Place, Scout

OUT_OF_STEP = ""  # in the place of a layer's name: a layer was called twice, or by some batches before others


class Lockstep:
    """The passes of all batches, each in a coroutine of its own; a context manager.

    Coroutines of this kind (greenlets) can wait inside any forward, whoever wrote it, and run in one thread,
    so that nothing runs at the same time.
    """

    def __init__(
        self, network: nn.Module, layers: dict[str, Layer], batches: list[Any], forward_fn: ForwardFn | None
    ) -> None:
        self._network, self._layers, self._batches, self._forward_fn = network, layers, batches, forward_fn
        self._places: dict[str, Place] = {}
        self._in_step = True
        self.has_state = False  # passes leave something behind, or enter contexts
        self._index = 0  # of the batch that runs
        self._calls: list[list[str]] = [[] for _ in batches]
        self._inside: list[list[nn.Module]] = [[] for _ in batches]  # modules that a batch can go back to
        self._passes = [greenlet(self._pass) for _ in batches]
        for running in self._passes:
            running.gr_context = copy_context()
        self._main = greenlet.getcurrent()
        self._modes = _Modes(network)
        self._stack = ExitStack()

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            for running in reversed(self._passes):  # contexts are left in the opposite order of entering them
                with suppress(BaseException):  # a forward may catch even this
                    if not running.dead:
                        running.throw(GreenletExit)
        finally:
            self._stack.close()

    def scout(self, memory: float) -> None:
        """Pass the first batch as it is, to see in which order layers are called and how much waiting keeps."""
        scout = Scout(self._network, self._layers)

        def visit(layer: Layer, x: Tensor) -> None:
            state.look()
            scout.visit(layer, x)

        with watched(self._network, self._layers, visit), scout.watching():
            state = StateOfPasses(self._network, self._forward_fn)
            forward(self._network, copied(self._batches[0]), 0, self._forward_fn, ReestimationError)
            state.look(last=True)
        self._places = {visit.name: visit.place(memory / len(self._batches)) for visit in scout.visits}
        self.has_state = state.found
        self._in_step = len(self._places) == len(scout.visits) and not state.found
        self._stack.enter_context(watched(self._network, self._layers, self._before_layer))
        for module in {place for place in self._places.values() if place is not None}:
            handle = module.register_forward_pre_hook(self._before_module, with_kwargs=True)
            self._stack.callback(handle.remove)

    def advance(self) -> set[str]:
        """Let every batch go on to the next layer without statistics; the names of the layers where they wait."""
        if not self._in_step:
            return {OUT_OF_STEP}
        with suppress(_OutOfStep):
            return {name for index in range(len(self._passes)) if (name := self._go_on(index)) is not None}
        return {OUT_OF_STEP}

    def _go_on(self, index: int) -> str | None:
        """Let one batch go on; the layer where it waits, None at its end."""
        self._index = index
        running = self._passes[index]
        return None if running.dead else running.switch()

    def _pass(self) -> None:
        forward(self._network, self._batches[self._index], self._index, self._forward_fn, ReestimationError)

    def _before_layer(self, layer: Layer, x: Tensor) -> None:
        calls = self._calls[self._index]
        if layer.name in calls:
            raise _OutOfStep
        if not calls:
            refuse_empty(layer, x, self._index)
        calls.append(layer.name)
        if layer.done:
            return
        layer.add(x, self._index)
        place = self._places.get(layer.name)
        if place is not None and place in self._inside[self._index]:
            raise _GoBack(place, layer.name)
        self._wait(layer.name)

    def _before_module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Come again for every layer inside that sends batches back here."""
        calls = self._calls[self._index]
        before = len(calls)
        for name, place in self._places.items():
            if place is not module or self._layers[name].done:
                continue
            # The exception must be gone before the wait: its traceback keeps the tensors of the pass.
            came_to = self._run_inside(module, args, kwargs)
            del calls[before:]
            if came_to is None:
                return  # another path than that of the first batch
            self._wait(came_to)

    def _run_inside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Run a module up to a layer that sends batches back to it; None where there is none."""
        # Copies: an operation in place would change what the next time finds.
        args, kwargs = copied((args, kwargs))
        inside = self._inside[self._index]
        inside.append(module)
        try:
            module.forward(*args, **kwargs)
        except _GoBack as back:
            if back.place is not module:
                raise
            return back.name
        finally:
            inside.remove(module)
        return None

    def _wait(self, name: str) -> None:
        with self._modes.entered():
            self._main.switch(name)


class _Modes:
    """The thread's gradient, inference and autocast modes, which another batch must not inherit."""

    def __init__(self, network: nn.Module) -> None:
        kinds = {t.device.type for t in (*network.parameters(), *network.buffers())} | {"cpu"}
        self._inference = torch.is_inference_mode_enabled()
        self._autocast = {k: (torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds - {"meta"}}

    def entered(self) -> ExitStack:
        """A context with the modes of the beginning."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(self._inference))
        stack.enter_context(torch.no_grad())
        for kind, (enabled, dtype) in self._autocast.items():
            stack.enter_context(torch.autocast(kind, dtype, enabled))
        return stack


class _GoBack(BaseException):
    """To a module around the layer; no Exception, which a forward might catch."""

    def __init__(self, place: nn.Module, name: str) -> None:
        super().__init__()
        self.place, self.name = place, name


class _OutOfStep(BaseException):
    """A layer is called a second time in a pass."""
