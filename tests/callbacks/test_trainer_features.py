"""The whole suite of callbacks beside every feature of the Trainer."""

from __future__ import annotations

import copy
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ModelSummary,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationWarning,
    QuantizedExport,
    RunReport,
    UnsupportedNetworkError,
    calibrate_quantizers,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
)
from lightning_qbn.callbacks.building import plain
from lightning_qbn.fake_quantize import quantizers

from .conftest import (
    CONFIG,
    Base,
    Composed,
    Direct,
    Inside,
    Pictures,
    assert_same,
    features,
    state,
    train_loader,
    val_loader,
)


def suite(path: Path, more: Any = (), *, qat: Any = None, formats: Any = ("encodings",), **settings: Any) -> list[Any]:
    """All four callbacks, with others where weight averaging belongs."""
    metric = MulticlassAccuracy(3)
    return [
        qat or QuantizationAwareTraining(CONFIG),
        *more,
        BatchNormReestimation(2, metric=metric, **settings),
        QuantizedExport(str(path / "model.onnx"), formats),
        RunReport(str(path), metric),
    ]


def check(callbacks: list[Any], module: LightningModule, path: Path) -> None:
    """Everything was done, and the file is the network."""
    by_name = {type(callback).__name__: callback for callback in callbacks}
    export = by_name["QuantizedExport"]
    assert all(q.is_calibrated for q in quantizers(module).values())
    assert by_name["BatchNormReestimation"].kept
    assert by_name["BatchNormReestimation"].result.layers
    assert not export.folding.refused
    assert all(file.is_file() for file in export.files.values())
    accuracy = by_name["RunReport"].record.accuracy
    assert accuracy["folded"] == pytest.approx(accuracy["after_reestimation"], abs=0.05)
    if "onnx" in export.formats:
        parity = export.report.parity["disabled"]
        assert (parity.max_lsb or 0) <= 1.01
        assert parity.agreement >= 0.9
        assert accuracy["onnx"] == pytest.approx(accuracy["folded"], abs=0.05)
    assert not [name for name in vars(module) if name in ("on_save_checkpoint", "on_load_checkpoint", "setup", "log")]
    assert not list(path.glob("*.tmp"))


# Precision, gradients, limits


@pytest.mark.filterwarnings("ignore:You passed `Trainer.*precision='16-mixed'")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("scale", ["learned", "observed"])
def test_precision(precision, scale, make_trainer, tmp_path):
    module = Direct()
    qat = QuantizationAwareTraining(QuantizationConfig(weight_bits=4, scale=scale))
    callbacks = suite(tmp_path, qat=qat, formats=["onnx"])
    make_trainer(*callbacks, precision=precision, max_epochs=1).fit(module, train_loader(), val_loader())
    check(callbacks, module, tmp_path)
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert {t.dtype for q in quantizers(module).values() for t in q.state_dict().values()} == {wide}
    if precision == "bf16-true":
        assert module.conv.weight.dtype == torch.bfloat16


def test_half_precision_resumes_exactly(make_trainer, tmp_path):
    def run(**settings: Any) -> Direct:
        torch.manual_seed(0)
        module = Direct()
        keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = QuantizationAwareTraining(CONFIG), keeper
        trainer = make_trainer(*callbacks, enable_checkpointing=True, precision="bf16-true", max_epochs=3)
        trainer.fit(module, train_loader(), **settings)
        return module

    whole = run()
    assert_same(state(run(ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True)), state(whole))


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 4},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"overfit_batches": 2},
        {"limit_train_batches": 3, "limit_val_batches": 1},
        {"limit_train_batches": 0.5, "limit_val_batches": 0.5},
        {"limit_val_batches": 0},
        {"inference_mode": True},
        {"inference_mode": False},
        {"max_epochs": -1, "max_steps": 7},
        {"max_epochs": 50, "max_time": {"seconds": 1}},
        {"val_check_interval": 2},
        {"val_check_interval": 0.5},
        {"check_val_every_n_epoch": None, "val_check_interval": 4},
        {"check_val_every_n_epoch": 2},
        {"num_sanity_val_steps": 0},
        {"reload_dataloaders_every_n_epochs": 1},
        {"fast_dev_run": True},
        {"fast_dev_run": 2},
        {"detect_anomaly": True},
        {"deterministic": True},
        {"profiler": "simple"},
        {"enable_model_summary": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*dataloader.* has `shuffle=True`")
def test_settings(settings, make_trainer, tmp_path):
    module = Direct()
    callbacks = suite(tmp_path)
    if settings.get("limit_val_batches") == 0:
        callbacks = [callbacks[0], BatchNormReestimation(2), callbacks[2]]  # there is nothing to measure on
    trainer = make_trainer(*callbacks, **{"max_epochs": 2, **settings})
    trainer.fit(module, train_loader(), val_loader())
    torch.use_deterministic_algorithms(False)
    assert callbacks[1].kept
    if len(callbacks) == 4:
        check(callbacks, module, tmp_path)
    trainer.test(module, val_loader(), verbose=False)
    make_trainer(QuantizationAwareTraining(CONFIG), max_epochs=1).fit(module, train_loader())


def test_clipping_sees_bounded_gradients_of_scales(make_trainer):
    norms = []

    class Clipped(Direct):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            norms.extend(float(q.log2_scale.grad.abs().max()) for q in quantizers(self).values())
            super().configure_gradient_clipping(optimizer, *args, **kwargs)

        def training_step(self, *args: Any) -> Tensor:
            return 1e4 * super().training_step(*args)

    make_trainer(QuantizationAwareTraining(CONFIG), gradient_clip_val=0.5, max_epochs=1).fit(Clipped(), train_loader())
    assert max(norms) == 1.0


class Checkpointed(Base):
    """Activations are computed again in the backward pass."""

    def build(self) -> None:
        self.first, self.second, self.head = features()[:3], features()[3:6], nn.Linear(6, 3)
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        x = checkpoint(self.first, images, use_reentrant=False)
        x = checkpoint(self.second, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


def test_gradient_checkpointing(make_trainer, tmp_path):
    module = Checkpointed()
    callbacks = suite(tmp_path, formats=["onnx"])
    make_trainer(*callbacks, max_epochs=1).fit(module, train_loader(), val_loader())
    check(callbacks, module, tmp_path)
    assert set(integer_weights(module)) == {"first.0", "second.0", "head"}


# Manual optimization


class Gan(LightningModule):
    """Its generator alone is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 64), nn.Unflatten(1, (1, 8, 8))
        )
        self.critic = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        images = batch[0]
        of_generator, of_critic = self.optimizers()
        noise = torch.randn(len(images), 4)
        self.toggle_optimizer(of_generator)
        loss = F.softplus(-self.critic(self.generator(noise))).mean()
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_critic)
        loss = F.softplus(-self.critic(images)).mean() + F.softplus(self.critic(self.generator(noise).detach())).mean()
        of_critic.zero_grad()
        self.manual_backward(loss)
        of_critic.step()
        self.untoggle_optimizer(of_critic)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 0.01, weight_decay=0.1) for part in (self.generator, self.critic)]


def test_gan_whose_generator_alone_is_quantized(make_trainer, tmp_path):
    def forward_fn(module: Gan, batch: Any) -> Tensor:
        return module.generator(torch.randn(len(batch[0]), 4))

    module = Gan()
    config = QuantizationConfig(weight_bits=4, skip=["critic"])
    export = QuantizedExport(str(tmp_path / "model.onnx"), forward_fn=forward_fn)
    callbacks = [
        QuantizationAwareTraining(config, scale_lr=0.001, forward_fn=forward_fn),
        BatchNormReestimation(4, forward_fn=forward_fn),
        export,
    ]
    keeper = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer = make_trainer(*callbacks, keeper, enable_checkpointing=True)
    with pytest.warns(QuantizationWarning, match=r"critic\.1 was reached by no batch"):
        trainer.fit(module, train_loader())
    assert set(integer_weights(module)) == {"generator.0", "generator.3"}
    assert all(name.startswith("generator") for name in quantizers(module))
    assert export.network == "generator"
    assert export.report.parity["disabled"].max_lsb <= 1.01
    ours = {id(q.log2_scale) for q in quantizers(module).values()}
    held = [{id(p) for g in optimizer.param_groups for p in g["params"]} for optimizer in trainer.optimizers]
    assert ours <= held[0]
    assert not ours & held[1]
    assert trainer.optimizers[0].param_groups[-1]["lr"] == 0.001
    assert trainer.optimizers[0].param_groups[-1]["weight_decay"] == 0.0
    # The critic is normalised as its training left it, where nobody calls it in re-estimation.
    assert set(callbacks[1].result.state(new=True)) == {"generator.1.running_mean", "generator.1.running_var"}
    resumed = Gan()
    with pytest.warns(QuantizationWarning, match=r"critic\.1 was reached by no batch"):
        make_trainer(*callbacks, max_epochs=3).fit(
            resumed, train_loader(), ckpt_path=tmp_path / "epoch=0.ckpt", weights_only=True
        )
    assert callbacks[1].kept


# When layers are there


class InSetup(Composed):
    """Its head is made when the data is known."""

    def build(self) -> None:
        self.features, self.head = features(), None

    def setup(self, stage: str) -> None:
        if self.head is None:
            self.head = nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))


class InConfigureModel(InSetup):
    setup = LightningModule.setup

    def configure_model(self) -> None:
        InSetup.setup(self, "fit")


class InBoth(InSetup):
    def setup(self, stage: str) -> None:
        self.classes = 3

    def configure_model(self) -> None:
        if self.head is None:
            self.head = nn.Linear(96, self.classes)


@pytest.mark.parametrize("cls", [InSetup, InConfigureModel, InBoth])
def test_layers_that_are_made_late(cls, make_trainer, tmp_path):
    module = cls()
    callbacks = suite(tmp_path, formats=["onnx"])
    keeper = ModelCheckpoint(tmp_path)
    trainer = make_trainer(*callbacks, keeper, enable_checkpointing=True, max_epochs=1)
    trainer.fit(module, train_loader(), val_loader())
    check(callbacks, module, tmp_path)
    assert any(name.startswith("head") for name in integer_weights(module))
    assert trainer.lightning_module is module
    fresh = cls()
    trainer.test(fresh, val_loader(), ckpt_path="best", weights_only=True, verbose=False)
    assert_same(state(fresh), state(module))
    make_trainer(*suite(tmp_path), max_epochs=1).fit(module, train_loader(), val_loader())


def test_layers_that_are_made_anew_in_every_stage(make_trainer):
    class Anew(Composed):
        def setup(self, stage: str) -> None:
            self.head = nn.Linear(96, 3)

    module = Anew()
    trainer = make_trainer(QuantizationAwareTraining(CONFIG), max_epochs=1)
    trainer.fit(module, train_loader())
    with pytest.raises(UnsupportedNetworkError, match="was replaced after its quantizers were inserted"):
        trainer.test(module, val_loader(), verbose=False)


def test_layers_that_come_too_late_for_averaging(make_trainer):
    callbacks = QuantizationAwareTraining(CONFIG), WeightAveraging(use_buffers=False)
    with pytest.raises(UnsupportedNetworkError, match=r"made head\.0, head\.2 after quantizers were inserted"):
        make_trainer(*callbacks).fit(InSetup(), train_loader())


def test_setup_that_makes_no_layers_beside_averaging(make_trainer, tmp_path):
    class Harmless(Direct):
        def setup(self, stage: str) -> None:
            self.stage = stage

    module = Harmless()
    callbacks = suite(tmp_path, [WeightAveraging(use_buffers=False)])
    make_trainer(*callbacks, max_epochs=1).fit(module, train_loader(), val_loader())
    check(callbacks, module, tmp_path)
    assert module.stage == "fit"


# Compiled


class Silent(Direct):
    """Lightning's log cannot be compiled in this version."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    test_step = validation_step


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # within torch._dynamo
@pytest.mark.parametrize("how", ["whole", "in place", "part"])
def test_compiled(how, make_trainer, tmp_path):
    torch._dynamo.reset()
    module: Any = Inside() if how == "part" else Silent()
    given = module
    if how == "whole":
        given = torch.compile(module, backend="eager")
    elif how == "in place":
        module.compile(backend="eager")
    else:
        module.net = torch.compile(module.net, backend="eager")
    callbacks = suite(tmp_path, formats=["onnx"])
    trainer = make_trainer(*callbacks, max_epochs=2)
    trainer.fit(given, train_loader(), val_loader())
    check(callbacks, module, tmp_path)
    # The compiled code quantizes: without quantizers the result is another.
    images = Pictures().images
    module.eval()
    run = module.net if how == "part" else module
    rounded = run(images)
    for quantizer in quantizers(module).values():
        quantizer.enabled = False
    torch._dynamo.reset()
    assert not torch.equal(run(images), rounded)
    for quantizer in quantizers(module).values():
        quantizer.enabled = True
    torch._dynamo.reset()
    if how == "whole":
        assert module._compiler_ctx is not None
        assert "forward" in vars(module)
        assert torch.equal(plain(module)(images), rounded)
        assert not {"forward", "training_step"} & set(vars(module))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # within torch._dynamo
@pytest.mark.parametrize(
    ("how", "before"),
    [
        ("whole", ["float"]),
        ("in place", ["quantized", "eval"]),
        *[
            pytest.param(how, before, marks=pytest.mark.slow)
            for how, before in [
                *[("in place", ["float"]), ("whole", ["quantized"]), ("in place", ["quantized"])],
                *[("whole", ["float", "float"]), ("in place", ["float", "float"]), ("whole", ["quantized", "eval"])],
            ]
        ],
    ],
    ids=str,
)
def test_compiled_module_is_fitted_again(how, before, make_trainer, tmp_path):
    """Lightning wraps the compiled steps in every fit; the file is that of the same runs without compilation."""

    def run(compiles: bool, path: Path) -> tuple[Silent, QuantizedExport]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        module: Any = Silent()
        given = torch.compile(module, backend="eager") if compiles and how == "whole" else module
        if compiles and how == "in place":
            module.compile(backend="eager")
        for step in before:
            if step == "eval":
                module.eval()
            else:
                qat = [QuantizationAwareTraining(CONFIG)] if step == "quantized" else []
                make_trainer(*qat, max_epochs=1).fit(given, train_loader(), val_loader())
        export = QuantizedExport(str(path), ["onnx"])
        callbacks = QuantizationAwareTraining(CONFIG), BatchNormReestimation(2), export
        # A warning that quantizers did not run would be an error here.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*(eval mode|frozen)")
            make_trainer(*callbacks, max_epochs=1).fit(given, train_loader(), val_loader())
        return module, export

    expected, _ = run(False, tmp_path / "plain.onnx")
    module, export = run(True, tmp_path / "compiled.onnx")
    assert_same(integer_weights(module), integer_weights(expected))
    assert_same(state(module), state(expected))
    assert not {"forward", "training_step"} & set(vars(export.folded))
    files = [onnx.load(tmp_path / name).graph for name in ("plain.onnx", "compiled.onnx")]
    kinds = [Counter(node.op_type for node in graph.node) for graph in files]
    assert kinds[0] == kinds[1]
    assert kinds[1]["QuantizeLinear"] == 5
    tensors = [sorted(onnx.numpy_helper.to_array(t).tobytes() for t in graph.initializer) for graph in files]
    assert tensors[0] == tensors[1]


def test_step_that_the_user_put_on_the_object_stays():
    module = Silent()
    module.training_step = mine = lambda batch, batch_idx: None
    assert plain(module).training_step is mine


def test_copy_of_a_compiled_module_runs_its_own_weights():
    module = Direct()
    insert_quantizers(module, CONFIG)
    calibrate_quantizers(module, train_loader(), 1)
    module.compile(backend="eager")
    images = Pictures().images
    for copied in (copy.deepcopy(module).eval(), fold_batch_norms(module)):
        before = copied(images)
        with torch.no_grad():
            module.head.bias += 100
        assert torch.equal(copied(images), before)


# Callbacks of Lightning


OTHERS = {
    "summary": lambda path: ModelSummary(2),
    "early stopping": lambda path: EarlyStopping("val_loss", patience=0, min_delta=100.0),
    "rates": lambda path: LearningRateMonitor(),
    "pruning": lambda path: ModelPruning("l1_unstructured", amount=0.3, verbose=0),
    "checkpoint": lambda path: ModelCheckpoint(path / "kept", save_last=True),
}


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_callbacks_in_both_orders(name, first, make_trainer, tmp_path):
    module = Direct()
    callbacks = suite(tmp_path)
    other = OTHERS[name](tmp_path)
    every = [other, *callbacks] if first else [*callbacks, other]
    trainer = make_trainer(
        *every, logger=CSVLogger(tmp_path, name="log"), enable_checkpointing=name == "checkpoint", max_epochs=3
    )
    trainer.fit(module, train_loader(), val_loader())
    check(callbacks, module, tmp_path)
    assert len(module.seen) == (96 if name == "early stopping" else 144)
    if name == "rates":
        text = (tmp_path / "log/version_0/metrics.csv").read_text()
        assert "lr-SGD/pg2" in text.splitlines()[0]
    if name == "pruning":
        zeros = [float((values == 0).float().mean()) for values in integer_weights(module).values()]
        assert min(zeros) >= 0.2


@pytest.mark.filterwarnings("ignore:Swapping scheduler.*")
@pytest.mark.parametrize("kind", [WeightAveraging, EMAWeightAveraging, StochasticWeightAveraging])
def test_averaging_in_both_orders(kind, make_trainer, tmp_path):
    def averaging() -> Any:
        settings = {"swa_lrs": 0.01} if kind is StochasticWeightAveraging else {"use_buffers": True}
        return kind(**settings)

    module = Direct()
    callbacks = suite(tmp_path, [averaging()])
    make_trainer(*callbacks, max_epochs=3).fit(module, train_loader(), val_loader())
    check(callbacks, module, tmp_path)
    assert callbacks[2].result.is_in_place()
    for wrong in ([averaging(), QuantizationAwareTraining(CONFIG)], [*suite(tmp_path), averaging()]):
        with pytest.raises(ConfigurationError, match="stands after"):
            make_trainer(*wrong).fit(Direct(), train_loader(), val_loader())


@pytest.mark.filterwarnings(
    "ignore:The provided params to be (un)?frozen already exist", "ignore:.*module.s. in eval mode"
)
def test_finetuning_that_freezes_the_backbone(make_trainer, tmp_path):
    class Tuned(Composed):
        def build(self) -> None:
            super().build()
            self.backbone = self.features

        def configure_optimizers(self) -> Any:
            trainable = [p for p in self.parameters() if p.requires_grad]
            return torch.optim.SGD(trainable, 0.02, weight_decay=0.01)

    for first in (True, False):
        module = Tuned()
        tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
        qat = QuantizationAwareTraining(CONFIG)
        callbacks = [tuning, qat] if first else [qat, tuning]
        trainer = make_trainer(*callbacks, BatchNormReestimation(2), max_epochs=3)
        trainer.fit(module, train_loader(), val_loader())
        held = [id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]]
        assert len(held) == len(set(held))
        for quantizer in quantizers(module).values():
            (group,) = [
                g for g in trainer.optimizers[0].param_groups if any(p is quantizer.log2_scale for p in g["params"])
            ]
            assert group["weight_decay"] == 0


# Breaking off


class Break(Callback):
    """Raises in one of its hooks."""

    def __init__(self, hook: str, exception: BaseException) -> None:
        def raises(*args: Any, **kwargs: Any) -> None:
            raise exception

        setattr(self, hook, raises)


HOOKS = ["setup", "on_fit_start", "on_train_start", "on_train_batch_end", "on_validation_epoch_end"]
HOOKS += ["on_train_epoch_end", "on_train_end", "on_fit_end"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("exception", [RuntimeError("out of coffee"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_module_is_usable_whenever_a_run_breaks_off(hook, exception, make_trainer, tmp_path):
    module = InSetup() if hook == "setup" else Direct()
    before = signal.getsignal(signal.SIGINT)
    callbacks = suite(tmp_path, qat=QuantizationAwareTraining(CONFIG, QATSchedule(freeze_batch_norm_at=1)))
    callbacks.insert(1, Break(hook, exception))
    try:
        with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
            make_trainer(*callbacks, num_sanity_val_steps=0).fit(module, train_loader(), val_loader())
    finally:
        signal.signal(signal.SIGINT, before)
    assert not [name for name in vars(module) if name in ("on_save_checkpoint", "on_load_checkpoint", "setup", "log")]
    if hook == "on_validation_epoch_end":
        module.train()  # Lightning leaves it in evaluation mode, with or without us
    assert all(m.training for m in module.modules())
    again = suite(tmp_path)
    make_trainer(*again, max_epochs=1).fit(module, train_loader(), val_loader())
    check(again, module, tmp_path)


# Other packages


def test_trainer_of_pytorch_lightning_is_refused_at_once(tmp_path):
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        trained = False

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.trained = True
            return self.layer(batch).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    for callback in suite(tmp_path):
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback], max_epochs=1
        )
        module = Module()
        with pytest.raises(ConfigurationError, match=r"import lightning\.pytorch as pl"):
            trainer.fit(module, torch.randn(4, 2, 4))
        assert not module.trained
        assert not quantizers(module)


@pytest.mark.parametrize("name", ["QuantizationAwareTraining", "BatchNormReestimation", "QuantizedExport", "RunReport"])
@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_strategies_that_shard_are_refused(name, strategy, make_trainer, tmp_path):
    from lightning.pytorch import strategies

    (callback,) = [c for c in suite(tmp_path) if type(c).__name__ == name]
    trainer = make_trainer(callback)
    trainer.strategy.__class__ = getattr(strategies, strategy)
    with pytest.raises(UnsupportedNetworkError, match=rf"{strategy} splits parameters.*strategy='ddp'"):
        callback.setup(trainer, Direct(), "fit")


def test_unfinished_schedule_is_said(make_trainer):
    qat = QuantizationAwareTraining(CONFIG, QATSchedule(weight_bits={0: 8, 2: 4}))
    stop = EarlyStopping("val_loss", patience=0, min_delta=100.0)
    with pytest.warns(QuantizationWarning, match=r"quantizers of \[8\] bits still"):
        make_trainer(qat, stop, max_epochs=5).fit(Direct(), train_loader(), val_loader())
