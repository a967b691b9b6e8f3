"""Learned scales in the user's optimizers and schedulers."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import lr_scheduler

from lightning_qbn import QATSchedule, QuantizationAwareTraining, QuantizationConfig, QuantizationWarning
from lightning_qbn.fake_quantize import quantizers

from .conftest import CONFIG, Composed, Direct, assert_same, state, train_loader, val_loader


class Rates(Callback):
    """Learning rates of all groups after every batch, and the scales before the first step and at the end."""

    def __init__(self) -> None:
        self.rates, self.momenta = [], []
        self.before = self.after = None

    def on_train_start(self, trainer, pl_module) -> None:
        self.before = scales(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self.rates.append([float(group["lr"]) for group in groups])
        self.momenta.append([group.get("momentum") for group in groups])

    def on_train_end(self, trainer, pl_module) -> None:
        self.after = scales(pl_module)


def scales(module) -> dict:
    return {name: q.log2_scale.detach().clone() for name, q in quantizers(module).items()}


def fit(cls, configure, make_trainer, scale_lr=None, **settings):
    """A module trained with what ``configure(module)`` gives; its Trainer and the learning rates."""
    module = cls()
    module.configure_optimizers = lambda: configure(module)
    rates = Rates()
    callback = QuantizationAwareTraining(CONFIG, scale_lr=scale_lr)
    trainer = make_trainer(callback, rates, **{"max_epochs": 3, **settings})
    trainer.fit(module, train_loader(), val_loader())
    return module, trainer, rates


def sgd(module, lr=0.02, **settings):
    return torch.optim.SGD(module.parameters(), lr, momentum=0.9, weight_decay=0.1, **settings)


def check_groups(module, optimizers) -> dict:
    """Every parameter is held once; scales are in a group of their own without weight decay, which is returned."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    ours = {id(q.log2_scale) for q in quantizers(module).values()}
    of_scales = [group for group in groups if {id(p) for p in group["params"]} & ours]
    assert {id(p) for group in of_scales for p in group["params"]} == ours
    assert all(group["weight_decay"] == 0 for group in of_scales)
    return of_scales[0]


def schedulers(name, optimizer):
    return {
        "step": lambda: lr_scheduler.StepLR(optimizer, 1, gamma=0.5),
        "cosine": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 3),
        "restarts": lambda: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
        "one cycle": lambda: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=18),
        "cyclic": lambda: lr_scheduler.CyclicLR(optimizer, 0.01, 0.04, step_size_up=4),
        "lambda": lambda: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch)),
        "multiplicative": lambda: lr_scheduler.MultiplicativeLR(optimizer, lambda epoch: 0.7),
        "plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=100.0),
        "sequential": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), lr_scheduler.StepLR(optimizer, 1, gamma=0.5)],
            milestones=[1],
        ),
        "chained": lambda: lr_scheduler.ChainedScheduler(
            [lr_scheduler.ConstantLR(optimizer, 0.5, 1), lr_scheduler.ExponentialLR(optimizer, 0.5)]
        ),
    }[name]()


NAMES = ["step", "cosine", "restarts", "one cycle", "cyclic", "lambda", "multiplicative", "plateau"]
NAMES += ["sequential", "chained"]


def scheduled(name):
    def configure(module):
        optimizer = sgd(module)
        interval = "step" if name in ("one cycle", "cyclic") else "epoch"
        settings = {"scheduler": schedulers(name, optimizer), "interval": interval, "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    return configure


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [None, 0.25])
def test_schedulers_drive_the_scales_too(name, factor, make_trainer):
    plain = Direct()
    alone = Rates()
    plain.configure_optimizers = lambda: scheduled(name)(plain)
    make_trainer(alone, max_epochs=3).fit(plain, train_loader(), val_loader())

    start = schedulers(name, sgd(Direct())).optimizer.param_groups[0]["initial_lr"] if name != "plateau" else 0.02
    scale_lr = None if factor is None else factor * start
    module, trainer, rates = fit(Direct, scheduled(name), make_trainer, scale_lr)
    check_groups(module, trainer.optimizers)
    assert [first for first, _ in rates.rates] == pytest.approx([rate for (rate,) in alone.rates])
    assert [second for _, second in rates.rates] == pytest.approx([(factor or 1) * r for r, _ in rates.rates])
    assert len({first for first, _ in rates.rates}) > 1
    assert all(first == second for first, second in rates.momenta)


# Lightning saves an epoch's checkpoint before it steps ReduceLROnPlateau, so that one resumes a step behind by itself.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "plateau"])
def test_schedulers_resume(name, make_trainer, tmp_path):
    def run(*callbacks, **settings):
        module = Direct()
        module.configure_optimizers = lambda: scheduled(name)(module)
        rates = Rates()
        callbacks = (QuantizationAwareTraining(CONFIG, scale_lr=0.005), rates, *callbacks)
        keeps = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        trainer = make_trainer(*callbacks, enable_checkpointing=keeps, max_epochs=3)
        trainer.fit(module, train_loader(), val_loader(), **settings)
        return module, rates

    whole, all_rates = run(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    torch.manual_seed(1)
    module, rates = run(ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert rates.rates == all_rates.rates[12:]
    assert_same(state(module), state(whole))


def test_scales_are_trained_without_weight_decay(make_trainer):
    module, trainer, rates = fit(Direct, sgd, make_trainer)
    group = check_groups(module, trainer.optimizers)
    assert group["lr"] == 0.02
    assert group["momentum"] == 0.9
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.1
    moved = [name for name in rates.before if not torch.equal(rates.before[name], rates.after[name])]
    assert len(moved) == len(rates.before)


def test_scale_lr_zero_holds_the_scales(make_trainer):
    _, _, rates = fit(Direct, sgd, make_trainer, scale_lr=0.0)
    assert_same(rates.before, rates.after)


@pytest.mark.parametrize("scale_lr", [1e-4, 1e-2])
def test_scale_lr_is_how_far_a_scale_goes(scale_lr, make_trainer):
    def configure(module):
        return torch.optim.Adam(module.parameters(), 0.02)

    module, trainer, rates = fit(Direct, configure, make_trainer, scale_lr, max_epochs=1, limit_train_batches=1)
    assert check_groups(module, trainer.optimizers)["lr"] == pytest.approx(scale_lr)
    steps = torch.cat([(rates.after[name] - rates.before[name]).abs().flatten() for name in rates.before])
    assert float(steps.max()) == pytest.approx(scale_lr, rel=1e-2)


def groups(module):
    norms = [p for name, p in module.named_parameters() if "norm" in name]
    others = [p for name, p in module.named_parameters() if "norm" not in name]
    return torch.optim.AdamW([{"params": others, "lr": 0.01}, {"params": norms, "lr": 0.002, "weight_decay": 0.0}])


def named(module):
    return torch.optim.AdamW(module.named_parameters(), 0.01)


def named_groups(module):
    items = list(module.named_parameters())
    return torch.optim.AdamW([{"params": items[:4]}, {"params": items[4:], "lr": 0.005}], lr=0.01)


def left_out(module):
    return torch.optim.AdamW([p for name, p in module.named_parameters() if "quantizer" not in name], 0.01)


def named_left_out(module):
    return torch.optim.AdamW([(n, p) for n, p in module.named_parameters() if "quantizer" not in n], 0.01)


def only_head(module):
    return torch.optim.AdamW(module.head.parameters(), 0.01)


def tensor_rate(module):
    return torch.optim.AdamW(module.parameters(), torch.tensor(0.01), foreach=False)


MAKES = [groups, named, named_groups, left_out, named_left_out, only_head, tensor_rate]


@pytest.mark.parametrize("configure", MAKES, ids=lambda function: function.__name__)
@pytest.mark.parametrize("scale_lr", [None, 0.003])
def test_optimizers_of_many_makes(configure, scale_lr, make_trainer, tmp_path):
    def with_scheduler(module):
        optimizer = configure(module)
        return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, 10)]

    module, trainer, rates = fit(Direct, with_scheduler, make_trainer, scale_lr, max_epochs=1)
    group = check_groups(module, trainer.optimizers)
    optimizer = trainer.optimizers[0]
    assert all(len(g["params"]) == len(g["param_names"]) for g in optimizer.param_groups if "param_names" in g)
    if scale_lr is not None:
        assert group["initial_lr"] == pytest.approx(scale_lr)
    moved = [name for name in rates.before if not torch.equal(rates.before[name], rates.after[name])]
    assert moved
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Direct()
    resumed.configure_optimizers = lambda: with_scheduler(resumed)
    again = make_trainer(QuantizationAwareTraining(CONFIG, scale_lr=scale_lr), max_epochs=2)
    again.fit(resumed, train_loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    check_groups(resumed, again.optimizers)


def test_names_of_scales_stay_with_them(make_trainer):
    module, trainer, _ = fit(Direct, named, make_trainer, max_epochs=1)
    names = {id(p): name for name, p in module.named_parameters()}
    for group in trainer.optimizers[0].param_groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]


def test_frozen_backbone(make_trainer):
    class Tuned(Composed):
        def build(self) -> None:
            super().build()
            self.features.requires_grad_(False)

    def configure(module):
        return torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), 0.01)

    module = Tuned()
    before = {name: p.detach().clone() for name, p in module.features.named_parameters()}
    module.configure_optimizers = lambda: configure(module)
    trainer = make_trainer(QuantizationAwareTraining(CONFIG))
    trainer.fit(module, train_loader())
    check_groups(module, trainer.optimizers)
    assert_same(before, {name: dict(module.features.named_parameters())[name].detach() for name in before})


@pytest.mark.parametrize("scale_lr", [None, 0.01])
def test_group_that_is_held_still_by_a_zero_learning_rate(scale_lr, make_trainer):
    def configure(module):
        return torch.optim.SGD(
            [{"params": module.features.parameters(), "lr": 0.0}, {"params": module.head.parameters()}], lr=0.01
        )

    module, trainer, _ = fit(Composed, configure, make_trainer, scale_lr, max_epochs=1)
    group = check_groups(module, trainer.optimizers)
    if scale_lr is not None:
        assert group["lr"] == pytest.approx(scale_lr)


def test_two_optimizers_each_keep_their_scales(make_trainer):
    class Both(Composed):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(part.parameters(), 0.01) for part in (self.features, self.head)]

    module = Both()
    rates = Rates()
    trainer = make_trainer(QuantizationAwareTraining(CONFIG), rates, max_epochs=1)
    trainer.fit(module, train_loader())
    check_groups(module, trainer.optimizers)
    held = [{id(p) for g in optimizer.param_groups for p in g["params"]} for optimizer in trainer.optimizers]
    for part, ids in ((module.features, held[0]), (module.head, held[1])):
        assert {id(q.log2_scale) for q in quantizers(part).values()} <= ids


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer(make_trainer):
    module = Direct()
    module.configure_optimizers = lambda: None
    with pytest.warns(QuantizationWarning, match="will not be trained"):
        make_trainer(QuantizationAwareTraining(CONFIG), max_epochs=1).fit(module, train_loader())


def test_observed_scales_need_no_group(make_trainer):
    module = Direct()
    trainer = make_trainer(QuantizationAwareTraining(QuantizationConfig(scale="observed")), max_epochs=1)
    trainer.fit(module, train_loader())
    assert len(trainer.optimizers[0].param_groups) == 1


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_frozen_scales_are_not_moved_by_momentum(optimizer, make_trainer):
    module = Direct()
    module.configure_optimizers = lambda: optimizer(module.parameters(), 0.02)
    notes = []

    class Note(Callback):
        def on_train_epoch_end(self, trainer, pl_module) -> None:
            notes.append(scales(pl_module))

    callback = QuantizationAwareTraining(CONFIG, QATSchedule(freeze_scales_at=1))
    make_trainer(callback, Note(), max_epochs=3).fit(module, train_loader())
    assert_same(notes[0], notes[1])
    assert_same(notes[0], notes[2])


def test_exploding_gradients_do_not_explode_scales(make_trainer):
    class Exploding(Composed):
        def training_step(self, *args):
            return 1e6 * super().training_step(*args)

    class Scales(Callback):
        def on_train_start(self, trainer, pl_module):
            self.first = {name: q.scale.detach().clone() for name, q in quantizers(pl_module).items()}

    module, scales = Exploding(), Scales()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.01)
    make_trainer(QuantizationAwareTraining(CONFIG), scales, max_epochs=1).fit(module, train_loader())
    for name, quantizer in quantizers(module).items():
        octaves = (quantizer.scale.detach() / scales.first[name]).log2().abs().max()
        assert octaves <= 6 * 0.01 + 1e-4, name  # six steps of at most the learning rate


def test_lbfgs_keeps_its_one_group(make_trainer):
    _, trainer, rates = fit(Direct, lambda m: torch.optim.LBFGS(m.parameters(), 0.1, max_iter=2), make_trainer)
    assert len(trainer.optimizers[0].param_groups) == 1
    assert any(not torch.equal(rates.before[name], rates.after[name]) for name in rates.before)
