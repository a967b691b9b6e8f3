"""Export when fit ends: the files, what they compute, and what is found before training."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_qbn import (
    BatchNormReestimation,
    ConfigurationError,
    DataError,
    ExportError,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizationError,
    QuantizationWarning,
    QuantizedExport,
    fold_batch_norms,
    insert_quantizers,
    integer_weights,
)
from lightning_qbn.fake_quantize import quantizers

from .conftest import (
    CONFIG,
    Apart,
    Base,
    Composed,
    DictPictures,
    Direct,
    FromDicts,
    Inside,
    Pictures,
    WithoutNorm,
    assert_same,
    state,
    train_loader,
    val_loader,
)


def qat(**settings: Any) -> QuantizationAwareTraining:
    return QuantizationAwareTraining(CONFIG, **settings)


def run_file(path: Any, *inputs: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {node.name: value.numpy() for node, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@pytest.mark.parametrize("cls", [Direct, Inside, Composed, WithoutNorm])
def test_file_computes_what_was_trained(cls, make_trainer, tmp_path):
    module = cls()
    export = QuantizedExport(str(tmp_path / "out/model.onnx"))
    callbacks = [qat(), export] if cls is WithoutNorm else [qat(), BatchNormReestimation(4), export]
    make_trainer(*callbacks).fit(module, train_loader(), val_loader())
    assert export.files == {
        "onnx": tmp_path / "out/model.onnx",
        "encodings": tmp_path / "out/model.encodings.json",
    }
    images = Pictures(24, seed=1).images
    with torch.no_grad():
        expected = module.eval().classify(images)
        folded = export.folded.classify(images)
    step = max(float(q.scale.detach().max()) for name, q in quantizers(module).items() if "output" in name)
    assert torch.allclose(folded, expected, atol=1.01 * step)
    found = run_file(export.files["onnx"], images)
    assert (found - folded).abs().max() <= 1.01 * step
    assert export.report.parity["disabled"].max_lsb <= 1.01
    assert isinstance(export.folded, cls)
    assert not export.folding.refused
    assert len(export.folding.folded) == (0 if cls is WithoutNorm else 2)


def test_file_holds_the_trained_integers_and_the_config(make_trainer, tmp_path):
    module, export = Direct(), QuantizedExport(str(tmp_path / "model.onnx"))
    reestimation = BatchNormReestimation(2, metric=MulticlassAccuracy(3))
    trainer = make_trainer(qat(), reestimation, export)
    trainer.fit(module, train_loader(), val_loader())
    model = onnx.load(export.files["onnx"])
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    expected = integer_weights(export.folded)
    trained = integer_weights(module)
    assert set(expected) == {"conv", "depthwise", "head"}
    for name, values in expected.items():
        assert np.array_equal(stored[f"{name}.weight_integers"].astype(int), values.numpy().astype(int))
        assert torch.equal(values.abs(), trained[name].abs())
    entries = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(entries["quantization_config"]) == CONFIG.to_dict()
    metrics = json.loads(entries["metrics"])
    assert metrics["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert metrics["after_reestimation"] == pytest.approx(reestimation.after)
    assert metrics["before_reestimation"] == pytest.approx(reestimation.before)
    encodings = json.loads(export.files["encodings"].read_text())
    assert encodings["version"]


def test_trained_module_is_not_touched_and_fit_may_run_again(make_trainer, tmp_path):
    module, export = Direct(), QuantizedExport(str(tmp_path / "model.onnx"))
    plain = Direct()
    plain.load_state_dict(module.state_dict())
    make_trainer(qat(), max_epochs=1).fit(plain, train_loader())
    make_trainer(qat(), export, max_epochs=1).fit(module, train_loader())
    assert_same(state(module), state(plain))
    assert all(m.training for m in module.modules())
    assert all(p.requires_grad for p in module.parameters())
    first, folded = export.files["onnx"].read_bytes(), export.folded
    make_trainer(qat(), export, max_epochs=1).fit(module, train_loader())
    assert export.files["onnx"].read_bytes() != first
    assert export.folded is not folded
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("formats", [("onnx",), ("encodings",), ["onnx", "encodings", "program"]], ids=str)
def test_only_the_formats_that_were_asked_for(formats, make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "out/net.onnx"), formats=formats)
    make_trainer(qat(), export, max_epochs=1).fit(Inside(), train_loader(), val_loader())
    endings = {"onnx": "net.onnx", "encodings": "net.encodings.json", "program": "net.pt2"}
    beside = {"net.session.json"} if "onnx" in formats else set()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {endings[name] for name in formats} | beside
    assert set(export.files) == set(formats)
    assert (export.report is not None) == ("onnx" in formats)


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch.export.load of torch 2.10
def test_program_computes_what_was_trained(make_trainer, tmp_path):
    module, export = Direct(), QuantizedExport(str(tmp_path / "model.onnx"), formats=["program"])
    make_trainer(qat(), export, max_epochs=1).fit(module, train_loader(), val_loader())
    images = Pictures(5, seed=2).images
    program = torch.export.load(export.files["program"]).module()
    with torch.no_grad():
        difference = (program(images) - export.folded(images)).abs()
        assert difference.max() <= 1.01 * export.folded.head.output_quantizer.scale
    assert (difference < 1e-5).float().mean() > 0.8


def test_target_and_storage_reach_the_file(make_trainer, tmp_path):
    config = QuantizationConfig(4, 8, activation_symmetric=True)
    form = {"target": "tensorrt", "weight_storage": "int4"}
    export = QuantizedExport(str(tmp_path / "model.onnx"), formats=["onnx"], **form)
    make_trainer(QuantizationAwareTraining(config), export, max_epochs=1).fit(Inside(), train_loader(), val_loader())
    types = {tensor.data_type for tensor in onnx.load(export.files["onnx"]).graph.initializer}
    assert onnx.TensorProto.INT4 in types
    assert not {onnx.TensorProto.UINT8, onnx.TensorProto.INT32} & types
    with pytest.raises(ConfigurationError, match="target must be one of"):
        QuantizedExport(target="coreml")


@pytest.mark.parametrize("formats", ["onnx", (), ("onnx", "tflite"), [3]])
def test_wrong_formats_are_found_at_construction(formats):
    with pytest.raises(ConfigurationError, match="formats must be some of"):
        QuantizedExport(formats=formats)


@pytest.mark.parametrize("as_tuple", [True, False])
def test_example_input(as_tuple, make_trainer, tmp_path):
    example = torch.randn(3, 1, 8, 8)
    export = QuantizedExport(str(tmp_path / "model.onnx"), example_input=(example,) if as_tuple else example)
    make_trainer(qat(), export, max_epochs=1).fit(FromDictsWithCalls(), DataLoader(DictPictures(), 8))
    assert run_file(export.files["onnx"], Pictures(7).images).shape == (7, 3)


class FromDictsWithCalls(FromDicts):
    """Dictionaries that calibration understands, as the first element of a tuple."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch["image"], batch["label"], batch["number"])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Base.training_step(self, batch, batch_idx)


def test_forward_fn_shows_the_input_of_the_network(make_trainer, tmp_path):
    calls = {"forward_fn": lambda m, batch: m.net(batch["image"])}
    export = QuantizedExport(str(tmp_path / "model.onnx"), **calls)
    make_trainer(qat(**calls), export, max_epochs=1).fit(FromDicts(), DataLoader(DictPictures(), 8))
    assert export.network == "net"
    assert run_file(export.files["onnx"], Pictures(7).images).shape == (7, 3)


def test_forward_fn_that_does_not_call_the_network(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "model.onnx"), forward_fn=lambda m, batch: batch[0])
    with pytest.raises(ExportError, match=r"did not call the network 'net'.*example_input"):
        make_trainer(qat(), export, max_epochs=1).fit(Inside(), train_loader())


def test_one_network_with_preparation_around_it(make_trainer, tmp_path):
    class Prepared(Inside):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.net((images - images.mean()) / 2).softmax(1)

        def classify(self, images: torch.Tensor) -> torch.Tensor:
            return self.net((images - images.mean()) / 2)

    module, export = Prepared(), QuantizedExport(str(tmp_path / "model.onnx"))
    make_trainer(qat(), export, max_epochs=1).fit(module, train_loader(), val_loader())
    assert export.network == "net"
    images = Pictures(5).images
    with torch.no_grad():
        assert torch.allclose(run_file(export.files["onnx"], images), export.folded.net(images), atol=0.1)


def test_network_with_two_inputs_by_name(make_trainer, tmp_path):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(64, 8), nn.Linear(64, 8), nn.Linear(8, 3)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.one(left) + self.two(right)))

    class Paired(Base):
        def build(self) -> None:
            self.net = Pair()

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            flat = images.flatten(1)
            return self.net(right=-flat, left=flat)

    module, export = Paired(), QuantizedExport(str(tmp_path / "model.onnx"))
    make_trainer(qat(), export, max_epochs=1).fit(module, train_loader(), val_loader())
    flat = Pictures(5).images.flatten(1)
    with torch.no_grad():
        expected = export.folded.net(flat, -flat)
    assert torch.allclose(run_file(export.files["onnx"], flat, -flat), expected, atol=0.1)


def test_several_networks_without_forward_are_refused_before_training(make_trainer, tmp_path):
    # None of them is the network, and a file cannot hold both: better said before twenty epochs than after.
    forward_fn = {"forward_fn": lambda m, batch: m.classify(batch[0])}
    module = Apart()
    export = QuantizedExport(str(tmp_path / "model.onnx"), **forward_fn)
    with pytest.raises(QuantizationError, match="features"):
        make_trainer(qat(**forward_fn), export, max_epochs=1).fit(module, train_loader())
    assert not module.seen


def test_a_layer_outside_the_only_network_is_not_left_out_of_the_file(make_trainer, tmp_path):
    class Tail(Direct):
        def build(self):
            self.features = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
            self.tail = nn.Linear(4 * 36, 3)

        forward = LightningModule.forward

        def classify(self, images):
            return self.tail(self.features(images))

    forward_fn = {"forward_fn": lambda m, batch: m.classify(batch[0])}
    export = QuantizedExport(str(tmp_path / "model.onnx"), **forward_fn)
    with pytest.raises(ConfigurationError, match=r"no forward.*features"):
        make_trainer(qat(**forward_fn), export, max_epochs=1).fit(Tail(), train_loader())


# Found before training


@pytest.mark.parametrize("path", ["file/model.onnx", "file/deeper/model.onnx"])
def test_folder_that_cannot_be_written(path, make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    module = Direct()
    with pytest.raises(ExportError, match=r"cannot be written"):
        make_trainer(qat(), QuantizedExport(str(tmp_path / path))).fit(module, train_loader())
    assert not module.seen


def test_path_that_is_a_folder(make_trainer, tmp_path):
    (tmp_path / "model.onnx").mkdir()
    module = Direct()
    with pytest.raises(ExportError):
        make_trainer(qat(), QuantizedExport(str(tmp_path / "model.onnx"))).fit(module, train_loader())
    assert not module.seen


def test_no_quantizers(make_trainer, tmp_path):
    module = Direct()
    with pytest.raises(ConfigurationError, match=r"no quantizers.*QuantizationAwareTraining"):
        make_trainer(QuantizedExport(str(tmp_path / "model.onnx"))).fit(module, train_loader())
    assert not module.seen


def test_quantizers_inserted_by_hand_are_enough(make_trainer, tmp_path):
    from lightning_qbn import calibrate_quantizers

    module, export = Direct(), QuantizedExport(str(tmp_path / "model.onnx"))
    insert_quantizers(module, QuantizationConfig())
    calibrate_quantizers(module, train_loader(), 4)
    make_trainer(export, max_epochs=1).fit(module, train_loader())
    assert export.files["onnx"].is_file()


def test_other_stages_need_nothing(make_trainer, tmp_path):
    module = Direct()
    trainer = make_trainer(QuantizedExport(str(tmp_path / "out/model.onnx")))
    trainer.validate(module, val_loader(), verbose=False)
    assert not (tmp_path / "out").exists()


def test_nothing_is_exported_when_nothing_was_trained(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "model.onnx"))
    with pytest.warns(QuantizationWarning, match="exports nothing"):
        make_trainer(qat(), export, limit_train_batches=0).fit(Direct(), train_loader())
    assert export.files == {}
    assert not (tmp_path / "model.onnx").exists()


def test_a_run_that_stopped_before_it_quantized_says_so(make_trainer, tmp_path):
    export = QuantizedExport(str(tmp_path / "model.onnx"))
    callback = qat(schedule=QATSchedule(float_epochs=2))
    trainer = make_trainer(callback, export, max_epochs=-1, max_steps=4)
    with (
        pytest.warns(QuantizationWarning, match="trained in float only"),
        pytest.raises(QuantizationError, match="calibrat"),
    ):
        trainer.fit(Direct(), train_loader())
    assert not (tmp_path / "model.onnx").exists()


def test_interrupted_run_leaves_the_earlier_file(make_trainer, tmp_path):
    (tmp_path / "model.onnx").write_text("earlier")

    class Broken(Direct):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise RuntimeError("out of coffee")

    with pytest.raises(RuntimeError, match="coffee"):
        make_trainer(qat(), QuantizedExport(str(tmp_path / "model.onnx"))).fit(Broken(), train_loader())
    assert (tmp_path / "model.onnx").read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_file_is_of_the_network_after_reestimation(make_trainer, tmp_path):
    module, export = Direct(), QuantizedExport(str(tmp_path / "model.onnx"), formats=["encodings"])
    callback = BatchNormReestimation(6)
    make_trainer(qat(), callback, export, max_epochs=1).fit(module, train_loader())
    images = Pictures(9).images
    again = fold_batch_norms(module)
    callback.result.undo()
    stale = fold_batch_norms(module)
    with torch.no_grad():
        assert torch.equal(export.folded.eval()(images), again.eval()(images))
        assert not torch.equal(export.folded(images), stale.eval()(images))


@pytest.mark.parametrize("validated", [True, False])
def test_batches_of_another_form_are_found_before_training_ends(validated, make_trainer, tmp_path):
    def forward_fn(module: Any, batch: Any) -> Any:
        return module.net(batch["image"])

    module = FromDicts()
    export = QuantizedExport(str(tmp_path / "model.onnx"), ["encodings"])
    loaders = [DataLoader(DictPictures(), 8)] * (2 if validated else 1)
    with pytest.raises(DataError, match="forward_fn"):
        make_trainer(QuantizationAwareTraining(CONFIG, forward_fn=forward_fn), export).fit(module, *loaders)
    assert not module.seen
