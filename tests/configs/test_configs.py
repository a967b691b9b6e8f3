"""Every configuration composes, instantiates and runs."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_qbn import BatchNormReestimation, ConfigurationError, derived
from lightning_qbn.experiment import run
from lightning_qbn.float_key import float_key

CONFIGS = Path(__file__).parents[2] / "configs"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def composed(tmp_path: Path, *overrides: str) -> DictConfig:
    """The configuration as the command line composes it, with all files below ``tmp_path``."""
    with initialize_config_module("lightning_qbn.configs", version_base="1.3"):
        cfg = compose("train", [*overrides, f"paths.root={tmp_path}"], return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    OmegaConf.set_readonly(cfg.hydra, False)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(tmp_path / "run")
        cfg.paths.output_dir = str(tmp_path / "run")
        del cfg["hydra"]
    return cfg


@pytest.mark.parametrize(
    ("chosen", "kind"),
    [
        (None, None),
        ("tracking", "OscillationTracking"),
        ("dampening", "OscillationDampening"),
        ("freezing", "WeightFreezing"),
    ],
)
def test_oscillation_is_a_callback_behind_quantization(tmp_path, chosen, kind):
    cfg = composed(tmp_path, *([] if chosen is None else [f"oscillation={chosen}"]))
    kinds = [entry._target_.rpartition(".")[2] for entry in cfg.callbacks.values() if entry is not None]
    if kind is None:
        assert not {"OscillationTracking", "OscillationDampening", "WeightFreezing"} & set(kinds)
        return
    assert kinds[:3] == ["QuantizationAwareTraining", kind, "BatchNormReestimation"]
    assert type(instantiate(cfg.callbacks.oscillation)).__name__ == kind


def test_distillation_and_averaging_are_callbacks_before_reestimation(tmp_path):
    cfg = composed(tmp_path, "distillation=logits", "averaging=ema")
    kinds = [entry._target_.rpartition(".")[2] for entry in cfg.callbacks.values() if entry is not None]
    assert kinds[:4] == ["QuantizationAwareTraining", "Distillation", "EMAWeightAveraging", "BatchNormReestimation"]
    for name, kind in (("distillation", "Distillation"), ("averaging", "EMAWeightAveraging")):
        assert type(instantiate(cfg.callbacks[name])).__name__ == kind


@pytest.mark.parametrize(
    ("bits", "lr", "kinds"), [(2, 1.5e-3, ["FollowRecipe", "WeightFreezing"]), (8, 5e-5, ["FollowRecipe"])]
)
def test_a_recipe_fills_in_what_is_left_open(tmp_path, bits, lr, kinds):
    cfg = composed(tmp_path, f"quantization.weight_bits={bits}", "quantization.activation_bits=8")
    recipe = derived.fill(cfg)
    assert cfg.qat.optimizer.lr == recipe.lr == pytest.approx(lr)  # 30 % or 1 % of Adam's 0.005
    assert cfg.trainer.max_epochs == cfg.qat.epochs == recipe.epochs == {2: 6, 8: 3}[bits]  # of 30
    callbacks = [instantiate(cfg.callbacks.quantization), instantiate(cfg.callbacks.reestimation)]
    derived.insert(recipe, callbacks)
    assert [type(callback).__name__ for callback in callbacks[1:-1]] == kinds


def test_what_is_set_stands_above_the_recipe(tmp_path):
    cfg = composed(
        tmp_path, "qat.epochs=2", "qat.optimizer.lr=0.1", "qat.optimizer.weight_decay=0.02", "oscillation=dampening"
    )
    recipe = derived.fill(cfg)
    assert (recipe.epochs, recipe.lr, recipe.weight_decay) == (2, 0.1, 0.02)
    assert cfg.qat.optimizer == {"_target_": "torch.optim.Adam", "_partial_": True, "lr": 0.1, "weight_decay": 0.02}
    callbacks = [instantiate(cfg.callbacks.quantization), instantiate(cfg.callbacks.oscillation)]
    derived.insert(recipe, callbacks)
    kinds = [type(callback).__name__ for callback in callbacks]
    assert kinds == ["QuantizationAwareTraining", "FollowRecipe", "OscillationDampening"]
    assert "oscillating ones freeze" not in [rule.value for rule in callbacks[1].recipe.rules]


def test_a_run_without_quantizers_has_the_rates_of_the_recipe(tmp_path):
    cfg = composed(tmp_path, "callbacks.quantization=null")
    recipe, callbacks = derived.fill(cfg), [instantiate(cfg.callbacks.reestimation)]
    derived.insert(recipe, callbacks)
    assert [type(callback).__name__ for callback in callbacks] == ["FollowRecipe", "BatchNormReestimation"]


def test_observed_ranges_stop_where_the_recipe_says(tmp_path):
    cfg = composed(tmp_path, "quantization.scale=observed", "qat.epochs=4")
    derived.fill(cfg)
    assert instantiate(cfg.callbacks.quantization).schedule.freeze_observers_at == 3
    cfg = composed(tmp_path, "quantization.scale=observed", "qat.epochs=4", "qat.schedule.freeze_observers_at=1")
    derived.fill(cfg)
    assert cfg.qat.schedule.freeze_observers_at == 1


def test_a_scheduler_beside_the_recipe_is_refused(tmp_path):
    cfg = composed(tmp_path, "qat.scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, step_size: 1}")
    with pytest.raises(ConfigurationError, match="schedule of its own"):
        derived.fill(cfg)


def test_a_recipe_needs_the_rate_of_float_training(tmp_path):
    with pytest.raises(ConfigurationError, match=r"model\.optimizer\.lr"):
        derived.fill(composed(tmp_path, "~model.optimizer.lr"))


def test_without_a_recipe_nothing_is_filled_in(tmp_path):
    cfg = composed(tmp_path, "qat=short", "qat.optimizer.lr=0.02")
    assert derived.fill(cfg) is None
    assert cfg.qat.epochs == 2
    assert cfg.qat.optimizer == {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.02, "momentum": 0.9}


def test_without_a_recipe_everything_has_to_be_set(tmp_path):
    with pytest.raises(ConfigurationError, match="qat=short has both"):
        derived.fill(composed(tmp_path, "qat.recipe=null"))


OWN = ["model=own", "model.module._target_=mine.Mine", "model.epochs=10", "model.optimizer.lr=0.1"]
OWN += ["model.metric.num_classes=10"]


def test_a_module_with_optimizers_of_its_own_has_no_others(tmp_path):
    recipe = derived.fill(composed(tmp_path, *OWN))
    assert recipe.lr == pytest.approx(0.03)
    with pytest.raises(ConfigurationError, match="optimizers of its own"):
        derived.fill(composed(tmp_path, *OWN, "qat=short"))
    cfg = composed(tmp_path, *OWN, "qat=short", "qat.optimizer._target_=null")
    assert derived.fill(cfg) is None
    assert cfg.qat.epochs == 2


def test_an_optimizer_of_ones_own_gets_the_rate(tmp_path):
    other = ["qat.optimizer._target_=torch.optim.SGD", "+qat.optimizer.momentum=0.9"]
    with pytest.raises(ConfigurationError, match=r"Set qat\.optimizer\.lr as well"):
        derived.fill(composed(tmp_path, *other))  # 0.0015 would be a rate for Adam
    cfg = composed(tmp_path, *other, "qat.optimizer.lr=0.02")
    derived.fill(cfg)
    assert cfg.qat.optimizer == {"_target_": "torch.optim.SGD", "_partial_": True, "momentum": 0.9, "lr": 0.02}


@pytest.mark.parametrize(
    ("overrides", "mode", "whole"),
    [
        (["quantization.activation_bits=4"], "sequential", True),
        (["quantization.weight_bits=6"], "joint", False),
        ([], "sequential", True),
        (["quantization.activation_bits=4", "reestimation.mode=joint"], "joint", False),
        (["quantization.activation_bits=4", "reestimation.whole_biases=false"], "sequential", False),
        (["quantization.activation_bits=4", "qat=short"], "joint", False),
    ],
)
def test_statistics_are_re_estimated_as_the_recipe_says(tmp_path, overrides, mode, whole):
    cfg = composed(tmp_path, *overrides)
    derived.fill(cfg)
    assert (cfg.reestimation.mode, cfg.reestimation.whole_biases) == (mode, whole)
    assert isinstance(instantiate(cfg.callbacks.reestimation), BatchNormReestimation)


def test_observed_ranges_of_a_schedule_in_steps_are_left_to_the_user(tmp_path):
    in_steps = ["quantization.scale=observed", "qat.schedule.unit=step"]
    with pytest.raises(ConfigurationError, match="the step from which observed ranges stay"):
        derived.fill(composed(tmp_path, *in_steps))
    cfg = composed(tmp_path, *in_steps, "qat.schedule.freeze_observers_at=70")
    derived.fill(cfg)
    assert cfg.qat.schedule.freeze_observers_at == 70


def test_observed_ranges_move_after_epochs_in_float(tmp_path):
    cfg = composed(tmp_path, "quantization.scale=observed", "qat.epochs=8", "qat.schedule.float_epochs=4")
    derived.fill(cfg)
    assert cfg.qat.schedule.freeze_observers_at == 7


@pytest.mark.parametrize("base", [[], ["qat=short"]])
@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("qat.epochs=0", "at least 1, found 0"),
        ("qat.epochs=1.5", r"found 1\.5"),
        ("qat.epochs=-1", "found -1"),
        ("qat.schedule=null", r"qat\.schedule is null"),
        ("qat.optimizer=null", r"qat\.optimizer is null"),
    ],
)
def test_what_cannot_be_trained_is_said_before(tmp_path, base, override, word):
    with pytest.raises(ConfigurationError, match=word):
        derived.fill(composed(tmp_path, *base, override))


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*treespec, LeafSpec.*")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*")
def test_a_run_with_a_recipe_trains_and_prints_it(tmp_path, capsys):
    quick = ["debug=steps", "trainer.enable_progress_bar=false", "callbacks.progress=null"]
    run(composed(tmp_path, *quick))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["config"]["qat"]["optimizer"]["lr"] == pytest.approx(1.5e-3)
    assert "control" in report
    assert capsys.readouterr().out.count("LSQ") >= 1


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*", "ignore:.*treespec, LeafSpec.*")
@pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*")
@pytest.mark.parametrize(
    "experiment",
    [None, *(pytest.param(n, marks=pytest.mark.slow if n == "fashion_mnist" else ()) for n in names("experiment"))],
)
def test_experiment_runs_two_steps(experiment, tmp_path, capsys):
    if experiment == "fashion_mnist" and not FASHION_MNIST.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    chosen = [] if experiment is None else [f"experiment={experiment}"]
    if experiment == "epoch_sweep":
        chosen.append("reestimation.at_epochs=[1]")  # those of its 20 that there are here
    cfg = composed(
        tmp_path,
        *chosen,
        "debug=steps",
        "qat.control=false",
        "trainer.enable_progress_bar=false",
        "callbacks.progress=null",
    )
    accuracy = run(cfg)
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert accuracy == report["accuracy"]["after_reestimation"]
    assert all(isinstance(value, float) for value in report["accuracy"].values())
    assert report["config"]["quantization"]["weight_bits"] == cfg.quantization.weight_bits
    assert "ONNX in onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(
    "group", ["data", "model", "qat", "trainer", "logger", "callbacks", "debug", "launcher", "hparams_search"]
)
def test_every_choice_of_a_group_composes(group, tmp_path):
    for name in names(group):
        if name == "ray":  # a plugin of its own, and a large one
            continue
        cfg = composed(tmp_path, f"{group}={name}")
        assert OmegaConf.to_container(cfg, resolve=True)


def test_experiment_overrides_defaults_and_debug_overrides_experiment(tmp_path):
    assert composed(tmp_path).quantization.weight_bits == 2
    cfg = composed(tmp_path, "experiment=fashion_mnist", "debug=steps")
    assert cfg.data._target_.endswith("FashionMNIST")
    assert cfg.model.epochs == 1


@pytest.mark.parametrize("override", ["~callbacks.export", "callbacks.export=null"])
def test_a_callback_can_be_removed(override, tmp_path):
    callbacks = composed(tmp_path, override).callbacks
    assert callbacks.get("export") is None
    assert callbacks.reestimation is not None


def test_models_instantiate(tmp_path):
    for name in ("mobilenet", "resnet"):  # not those of torchvision or of one's own
        cfg = composed(tmp_path, f"model={name}", "model.module.network.batch_norm_momentum=0.2")
        network = instantiate(cfg.model.module.network)
        momenta = {m.momentum for m in network.modules() if hasattr(m, "momentum")}
        assert momenta == {0.2}


def test_a_config_directory_of_the_users_own_can_be_added(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\nquantization:\n  weight_bits: 5\n")
    cfg = composed(tmp_path, f"hydra.searchpath=[file://{tmp_path}]", "experiment=mine")
    assert cfg.quantization.weight_bits == 5


@pytest.mark.parametrize(
    ("override", "same"),
    [
        *[("qat.epochs=7", True), ("quantization.weight_bits=4", True), ("reestimation.num_batches=3", True)],
        *[("callbacks.export=null", True), ("trainer.enable_progress_bar=false", True)],
        *[("seed=1", False), ("model.epochs=3", False), ("data.batch_size=32", False), ("data=fashion_mnist", False)],
        *[
            ("trainer.limit_train_batches=2", False),
            ("model.optimizer.lr=0.1", False),
            ("trainer.precision=bf16-mixed", False),
        ],
        ("model.module.network.batch_norm_momentum=0.1", False),
    ],
)
def test_float_key_depends_on_what_determines_the_weights(override, same, tmp_path):
    assert (float_key(composed(tmp_path, override)) == float_key(composed(tmp_path))) is same


def float_key_of(tmp_path, target):
    return float_key(composed(tmp_path, f"model.module.network._target_={target}"))


@pytest.mark.parametrize("name", ["Mine", "make", "Mine.build", "partial"])
def test_float_key_depends_on_the_source_of_ones_own_classes(name, tmp_path, monkeypatch):
    source = tmp_path / "network_of_mine.py"
    source.write_text(
        "import functools, torch\n\nclass Mine(torch.nn.Module):\n    width = 8\n"
        "    build = classmethod(lambda cls: cls())\n\n"
        "@torch.no_grad()\ndef make():\n    return Mine()\n\npartial = functools.partial(Mine)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = float_key_of(tmp_path, f"network_of_mine.{name}")
    source.write_text(source.read_text().replace("8", "16"))
    assert float_key_of(tmp_path, f"network_of_mine.{name}") == before, "what was imported is still the old class"
    monkeypatch.delitem(sys.modules, "network_of_mine")
    assert float_key_of(tmp_path, f"network_of_mine.{name}") != before


def test_float_key_does_without_a_source(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "zipped.zip", "w") as archive:
        archive.writestr("module_in_a_zip.py", "class Mine: pass\n")
    (tmp_path / "module_that_fails.py").write_text("raise ValueError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "zipped.zip")
    for target in ("module_in_a_zip.Mine", "module_that_fails.Mine", "not_there.Mine"):
        float_key_of(tmp_path, target)  # instantiation says what is wrong with it


def test_every_key_is_explained():
    """A comment stands above the keys of each file or beside them."""
    silent = [
        p.name
        for p in CONFIGS.glob("*/*.yaml")
        if "#" not in p.read_text() and p.parent.name not in ("logger", "trainer", "hydra")
    ]
    assert silent == []
