"""Train with the float network as the teacher."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_qbn.arguments import is_number
from lightning_qbn.callbacks.checks import check_teaching
from lightning_qbn.callbacks.exported import exported_network
from lightning_qbn.callbacks.order import check_trainer
from lightning_qbn.distillation import feature_distance, float_teacher, frozen, soft_cross_entropy
from lightning_qbn.errors import ConfigurationError, QuantizationWarning
from lightning_qbn.fake_quantize import FakeQuantize, quantizers
from lightning_qbn.passes import copied

LossFn = Callable[[Any, Any], Tensor]


class Distillation(Callback):
    """Add the distance to a teacher to the loss: ``(1 - weight) * loss + weight * distance``.

    The teacher is the float network that training started from, in evaluation mode; checkpoints hold it, so that a
    resumed run has the same one. It sees the arguments of the quantized network, whatever ``training_step`` does with
    the outputs (Hinton et al., 2015, section 2; Mishra and Marr, "Apprentice", ICLR 2018, section 5.3, for quantized
    students). With manual optimization the loss must be no tensor that autograd keeps, such as that of a root.

    Args:
        weight: of the distance, from 0 to 1.
        temperature: of both softmaxes.
        features: names of layers inside the network, such as ``blocks.1.project.1``, whose outputs are compared too.
        feature_weight: what their mean relative square distance is multiplied by before it is added to the loss.
        teacher: another teacher, which takes the same arguments; default: the float network itself.
        loss_fn: ``loss_fn(student_output, teacher_output)`` for outputs that are no logits.

    Raises:
        ConfigurationError: a setting is wrong; outputs or features cannot be compared.

    Attributes:
        loss: the last distance.
    """

    _quantized = False  # whether quantizers were calibrated before the training
    _compared = False  # whether the present batch has called the student
    _answer: Any = None  # of the teacher, to the arguments of the student's present call

    def __init__(
        self,
        weight: float = 0.5,
        temperature: float = 1.0,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
        teacher: nn.Module | None = None,
        loss_fn: LossFn | None = None,
    ) -> None:
        _check("weight", weight, 0, 1)
        _check("temperature", temperature, 1e-3, 1e3)
        _check("feature_weight", feature_weight, 0, sys.float_info.max)
        check_teaching(features, teacher, loss_fn)
        self.weight, self.temperature, self.feature_weight = weight, temperature, feature_weight
        self.features, self.loss_fn, self._given = tuple(features), loss_fn, teacher
        self.loss: Tensor | None = None
        self._teacher: nn.Module | None = None
        self._saved: dict[str, Tensor] | None = None
        self._handles: list[Any] = []
        self._forget()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called first, before quantizers are calibrated: a new training has a new teacher."""
        check_trainer(trainer, stage)
        if stage == "fit" and not trainer.global_step:
            self._saved = self._teacher = None
            self._quantized = any(quantizer.is_calibrated for quantizer in quantizers(pl_module).values())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with everything restored: make the teacher, and listen to the student."""
        student = _student(trainer, pl_module)
        if self._teacher is None or self._saved is not None:  # else the same Trainer goes on, with the same teacher
            self._teacher = self._make(student, trainer.global_step > 0).to(pl_module.device)
        for network in (student, self._teacher):
            for name in self.features:
                self._handles.append(_layer(network, name).register_forward_hook(self._note_feature(network, name)))
        self._handles.append(student.register_forward_pre_hook(self._ask_teacher, with_kwargs=True))
        self._handles.append(student.register_forward_hook(self._compare))

    def _make(self, student: nn.Module, resumed: bool) -> nn.Module:
        if self._given is not None:
            return frozen(self._given)
        teacher = float_teacher(student)
        if self._saved is not None:
            teacher.load_state_dict(self._saved)
            self._saved = None
        elif resumed or self._quantized:
            where = "The checkpoint holds no teacher" if resumed else "The network was quantized before this training"
            rank_zero_warn(
                f"{where}, so Distillation takes the weights that training goes on with. If they have been trained "
                f"with quantizers, pass the float network as teacher=...",
                category=QuantizationWarning,
            )
        return teacher

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Called before a batch: what the student gives from now on is compared."""
        self._forget()
        self._listening, self._compared = True, False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Called with the loss, which gets its share of the distance in place: Lightning differentiates that."""
        self._listening = False  # checkpointed activations call layers again
        if not self._distances:
            return  # of another loss of the same step
        distance = torch.stack(self._distances).mean()
        self.loss = distance.detach()
        loss.mul_(1 - self.weight)
        loss.add_((distance * self.weight + self._between()) * _factor(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called with that done: a step may have several losses, or take its loss again."""
        self._forget()
        self._listening = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called after a batch, before validation."""
        self._forget()
        if not self._compared:
            raise ConfigurationError(
                f"training_step did not call {type(pl_module).__name__}'s quantized network with gradients, so "
                f"Distillation has nothing to compare. Leave it out, or call the network in training_step."
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called once an epoch: log the last distance."""
        if self.loss is not None:
            pl_module.log("distillation_loss", self.loss, sync_dist=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the last epoch: the student is listened to no more."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Called when training breaks off."""
        self._remove()

    def state_dict(self) -> dict[str, Any]:
        """The teacher, unless it was given."""
        return {} if self._teacher is None or self._given is not None else {"teacher": self._teacher.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the teacher of the run that is resumed."""
        self._saved = state_dict.get("teacher")

    def _ask_teacher(self, student: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Before the student: it may write over its input.
        if self._listening and self._teacher is not None and torch.is_grad_enabled():
            with torch.no_grad():
                self._answer = self._teacher(*copied(args), **copied(kwargs))

    def _compare(self, student: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._listening and torch.is_grad_enabled():
            self._compared = True
            if self.loss_fn is not None:
                self._distances.append(self.loss_fn(output, self._answer))
            else:
                self._distances.append(soft_cross_entropy(output, self._answer, self.temperature))

    def _note_feature(self, network: nn.Module, name: str) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._listening and (network is self._teacher or torch.is_grad_enabled()):
                self._found.setdefault(name, {}).setdefault(id(network), []).append(output)

        return note

    def _between(self) -> Tensor | float:
        """The weighted mean distance of features."""
        distances = []
        for name in self.features:
            outputs = list(self._found.get(name, {}).values())
            if len(outputs) != 2 or len(outputs[0]) != len(outputs[1]):
                raise ConfigurationError(
                    f"The feature {name!r} was not seen in both networks. Name a layer that is called as such, a "
                    f"convolution or a batch-norm: containers may be no part of a quantized network's pass."
                )
            teacher, student = outputs  # the teacher is asked first
            distances += [feature_distance(s, t) for s, t in zip(student, teacher, strict=True)]
        return self.feature_weight * torch.stack(distances).mean() if distances else 0.0

    def _forget(self) -> None:
        self._distances: list[Tensor] = []
        self._found: dict[str, dict[int, list[Tensor]]] = {}
        self._answer = None
        self._listening = False

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()


def _student(trainer: Trainer, module: LightningModule) -> nn.Module:
    try:
        name = exported_network(module)
    except ConfigurationError as cause:
        raise ConfigurationError(f"Distillation does not know which network is its student: {cause}") from cause
    if not name and trainer.model is not module:
        raise ConfigurationError(
            f"{type(trainer.strategy).__name__} calls {type(module).__name__} as a whole with the batch, so that "
            f"Distillation cannot tell calls of its forward from it. Put the layers into one network that is an "
            f"attribute of the module."
        )
    return module.get_submodule(name)


def _layer(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError as cause:
        leaves = (n for n, m in network.named_modules() if not isinstance(m, FakeQuantize))
        near = difflib.get_close_matches(name, leaves, n=3, cutoff=0.0)
        raise ConfigurationError(
            f"features has {name!r}, but {type(network).__name__} has no such layer. Names are written from the "
            f"network. Nearest: {', '.join(near)}."
        ) from cause


def _factor(trainer: Trainer) -> float:
    """What Lightning has multiplied the loss by: the share of accumulated batches, and the scale of half precision."""
    factor = 1.0
    if trainer.lightning_module.automatic_optimization:
        factor /= trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return factor if scaler is None else factor * float(scaler.get_scale())


def _check(name: str, value: Any, low: float, high: float) -> None:
    if not is_number(value, low, high):
        raise ConfigurationError(f"{name} must be a number from {low:g} to {high:g}, found {value!r}.")
