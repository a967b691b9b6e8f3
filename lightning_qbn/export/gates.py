"""What a file has to pass before it gets its name: the graph is right, and the runtime's kernels compute it."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lightning_qbn.errors import ExportError, QuantizationWarning
from lightning_qbn.export.inputs import tensors_in
from lightning_qbn.export.parity import Parity, distance, measure_parity, outputs_of, range_of
from lightning_qbn.export.remedies import REMEDIES
from lightning_qbn.export.runtime import SessionOptions, run_session, session
from lightning_qbn.export.stepwise import Step, compare_stepwise, left_out

if TYPE_CHECKING:
    import onnx

_MOST_LSB = 1.01  # the scale of an output is a float32
_MOST_DIFFERING = 0.01
_MOST_DIFFERING_WIDE = 0.25  # of more than 8 bits: sums in float32 are right to some hundredths of such a step
_MOST_REST = 1e-3  # of the largest value, in float
_ROUNDS = 5


@dataclass(frozen=True)
class Verdict:
    """Whether a file computes what was trained.

    Args:
        parity: of the outputs.
        steps: of single layers; empty where the outputs alone show that all is right.
        wrong: the first layer that differs from the simulation of its own input; None where there is none.
        rest: what differs behind the last quantizer; see `compare_stepwise`.
        lost: the runtime computes something else as soon as nobody looks at the integers of single layers.
    """

    parity: Parity
    steps: tuple[Step, ...] = ()
    wrong: Step | None = None
    rest: float = 0.0
    lost: bool = False

    @property
    def passed(self) -> bool:
        """The outputs are within one step and 1 %, or each layer is on the integers that the file gives it."""
        return self.wrong is None and self.rest <= _MOST_REST and not self.lost

    def __str__(self) -> str:
        """The diagnosis."""
        if self.wrong is not None:
            return (
                f"the first layer whose integers differ is {self.wrong.name}: by up to {self.wrong.max_lsb:g} steps, "
                f"in {self.wrong.differing:.2%} of its values"
            )
        if self.rest > _MOST_REST:
            return f"all integers agree, and behind the last of them outputs differ by {self.rest:.2g} of their range"
        if self.lost:
            return (
                f"each layer is right while its integers are read; outputs differ by {self.parity.max_difference:.3g} "
                f"while they are not: the runtime leaves out a rounding"
            )
        return f"largest difference {self.parity.max_difference:.3g}"


@dataclass(frozen=True)
class Shipment:
    """What passed as it is to be run.

    Args:
        proto: the file, which a remedy may have changed.
        options: to run it with.
        verdict: on it, with these options.
        remedy: what was needed for this processor, or None.
        milliseconds: of a batch: of the file as it was, and of each remedy that is exact.
    """

    proto: onnx.ModelProto
    options: SessionOptions
    verdict: Verdict
    remedy: str | None = None
    milliseconds: dict[str, float] = field(default_factory=dict)


def judge(deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...], options: SessionOptions) -> Verdict:
    """Compare a file with the deployed network in torch on one batch."""
    outputs = run_session(session(proto.SerializeToString(), options), tuple(tensors_in(inputs)))
    return weigh(deployed, inputs, outputs, lambda: compare_stepwise(deployed, proto, inputs, options))


def weigh(
    deployed: nn.Module,
    inputs: tuple[Any, ...],
    outputs: list[Tensor],
    stepwise: Callable[[], tuple[list[Step], float, list[Tensor]]],
) -> Verdict:
    """Compare what a runtime computes with the deployed network: its outputs, and where they differ its layers.

    Args:
        deployed: result of `deploy`.
        inputs: arguments of the network, a batch.
        outputs: of the runtime.
        stepwise: gives what `compare_stepwise` does.
    """
    parity = measure_parity(deployed, outputs_of(deployed, inputs), outputs)
    if parity.max_lsb is not None and parity.max_lsb <= _MOST_LSB and parity.differing <= _MOST_DIFFERING:
        return Verdict(parity)
    steps, rest, read = stepwise()
    wrong = next((step for step in steps if not _is_right(step)), None)
    # While they are read, each layer keeps its integers. Otherwise a runtime may leave out a rounding.
    lost = any(_differing(*pair) > _MOST_DIFFERING for pair in zip(read, outputs, strict=True))
    return Verdict(parity, tuple(steps), wrong, rest, lost)


def _differing(first: Tensor, second: Tensor) -> float:
    """Share of the values that differ by more than 1e-3 of the range, which is less than a step of 8 bits."""
    if not first.numel():
        return 0.0
    return float((distance(first, second) > _MOST_REST * range_of(first)).double().mean())


def _is_right(step: Step) -> bool:
    share = _MOST_DIFFERING if step.levels <= 256 else _MOST_DIFFERING_WIDE
    return step.max_lsb <= 1 and step.differing * step.values <= max(1.0, share * step.values)


def check_graph(deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...]) -> Verdict:
    """Gate A: without optimizations, so that the graph is run as it is written.

    Raises:
        ExportError: it is another network; names the first layer that is.
    """
    absent = left_out(deployed, proto, inputs)
    if absent is not None:
        raise ExportError(
            f"The exported graph does not round {absent}, which the trained network does. No file was written. Please "
            f"report the network; until then leave that layer in float with QuantizationConfig(skip=[...])."
        )
    verdict = judge(deployed, proto, inputs, SessionOptions("disabled"))
    if not verdict.passed:
        raise ExportError(
            f"The exported graph does not compute what was trained: {verdict}. No file was written. Please report "
            f"the network; until then leave that layer in float with QuantizationConfig(skip=[...])."
        )
    return verdict


def choose_kernels(deployed: nn.Module, proto: onnx.ModelProto, inputs: tuple[Any, ...]) -> Shipment:
    """Gate B: with the optimizations, kernels and processor that run it.

    Where these are not exact, as those for uint8 times int8 without VNNI, which saturate, the fastest remedy that is
    exact is chosen, and that is said.

    Raises:
        ExportError: no remedy helps; names the first layer that differs.
    """
    plain = Shipment(proto, SessionOptions(), judge(deployed, proto, inputs, SessionOptions()))
    if plain.verdict.passed:
        return plain
    found = []
    for name, remedy in REMEDIES.items():
        changed, options = remedy.change(proto), SessionOptions(entries=remedy.entries)
        try:
            verdict = judge(deployed, changed, inputs, options)
        except ExportError:  # this version of onnxruntime does not load it
            continue
        if verdict.passed:
            found.append(Shipment(changed, options, verdict, name))
    if not found:
        raise ExportError(
            f"onnxruntime's optimized kernels do not compute what was trained: {plain.verdict}. Without optimizations "
            f"they do. No remedy helps ({', '.join(REMEDIES)}), and no file was written. Please report the network."
        )
    times = _milliseconds([plain, *found], inputs)
    best = min(found, key=lambda shipment: times[str(shipment.remedy)])
    warnings.warn(
        f"{REMEDIES[str(best.remedy)].cause}: {plain.verdict}. The file is shipped with {best.remedy}, which is "
        f"exact and takes {times[str(best.remedy)] / times['none']:.2f} of the time.",
        QuantizationWarning,
        stacklevel=3,
    )
    return Shipment(best.proto, best.options, best.verdict, best.remedy, times)


def _milliseconds(shipments: list[Shipment], inputs: tuple[Any, ...]) -> dict[str, float]:
    """Median time of a batch, in turns."""
    tensors = tuple(tensors_in(inputs))
    sessions = {s.remedy or "none": session(s.proto.SerializeToString(), s.options) for s in shipments}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(_ROUNDS):
        for name, loaded in sessions.items():
            start = time.perf_counter()
            run_session(loaded, tensors)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
