"""Runs that are killed at random moments and resumed, started by test_killed.py.

Python counts the calls of a run; at the one that is drawn, the process kills itself. Children are forked, so that
nothing is imported again for each of them.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torchmetrics.classification import MulticlassAccuracy

sys.path.insert(0, str(Path(__file__).parents[1]))
from callbacks.conftest import Direct, train_loader, val_loader
from lightning_qbn import (
    BatchNormReestimation,
    QATSchedule,
    QuantizationAwareTraining,
    QuantizationConfig,
    QuantizedExport,
    RunReport,
    integer_weights,
)

SCHEDULE = QATSchedule(float_epochs=1, weight_bits={0: 8, 2: 4}, freeze_scales_at=3)
PHASES = ("calibration", "training", "checkpoint", "reestimation", "export")


class Counter:
    """Counts calls, notes which of them belong to which phase, and kills the process at one of them."""

    def __init__(self, fatal: int = -1) -> None:
        self.calls, self.fatal, self.phase = 0, fatal, "training"
        self.spans: dict[str, list[tuple[int, int]]] = {name: [] for name in PHASES}
        self._since = 0

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        self.calls += 1
        if self.calls == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def enter(self, phase: str) -> str:
        before = self.phase
        self.spans[before].append((self._since, self.calls))
        self.phase, self._since = phase, self.calls
        return before


def during(counter: Counter, owner: Any, name: str, phase: str) -> None:
    """Let a method be a phase."""
    own = getattr(owner, name)

    def method(*args: Any, **kwargs: Any) -> Any:
        before = counter.enter(phase)
        try:
            return own(*args, **kwargs)
        finally:
            counter.enter(before)

    setattr(owner, name, method)


class Count(Callback):
    """From the first hook on, and for the last time in the last one."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        sys.setprofile(self.counter)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        sys.setprofile(None)


class Scored(Direct):
    """Its third epoch is its best."""

    def on_validation_epoch_end(self) -> None:
        self.log("score", -float(abs(self.current_epoch - 2)))


def run(folder: Path, checkpoint: str, counter: Counter) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; what came out, as tensors."""
    torch.manual_seed(0)
    module = Scored(lr=0.05)
    quantization = QuantizationAwareTraining(QuantizationConfig(weight_bits=4), SCHEDULE, num_batches=2)
    reestimation = BatchNormReestimation(3, metric=MulticlassAccuracy(3), at_epochs=[2], checkpoint=checkpoint)
    export = QuantizedExport(str(folder / "model.onnx"))
    report = RunReport(str(folder), MulticlassAccuracy(3))
    keeper = ModelCheckpoint(folder, filename="{epoch}", monitor="score", mode="max")
    always = ModelCheckpoint(folder, filename="latest", save_last=True)
    during(counter, quantization, "_calibrate", "calibration")
    during(counter, reestimation, "_finish", "reestimation")
    during(counter, export, "on_fit_end", "export")
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=4,
        default_root_dir=folder,
        callbacks=[Count(counter), quantization, reestimation, export, report, keeper, always],
    )
    during(counter, trainer, "save_checkpoint", "checkpoint")
    trainer.fit(module, train_loader(), val_loader(), ckpt_path="last", weights_only=True)
    trained = torch.tensor(len(module.seen))
    counter.enter("training")
    found = {f"integers.{name}": value for name, value in integer_weights(module).items()}
    found |= {f"state.{name}": value for name, value in module.state_dict().items()}
    graph = onnx.load(folder / "model.onnx").graph
    found |= {f"onnx.{t.name}": torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    for name in ("best", "last"):
        path = keeper.best_model_path if name == "best" else always.last_model_path
        found |= {f"{name}.{k}": v for k, v in torch.load(path, weights_only=True)["state_dict"].items()}
    numbers = [reestimation.before, reestimation.after, *vars(reestimation.curve[0]).values()]
    numbers += list(report.record.accuracy.values())
    found["trained"] = trained
    found["numbers"] = torch.tensor([float("nan") if number is None else number for number in numbers])
    return found


def child(folder: Path, checkpoint: str, fatal: int = -1) -> int:
    """Run in a process of its own; its exit code, negative where a signal ended it."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        counter = Counter(fatal)
        found = run(folder, checkpoint, counter)
        torch.save(found, folder / "found.pt")
        (folder / "spans.json").write_text(json.dumps(counter.spans))
        os._exit(0)
    except BaseException:  # noqa: BLE001  the parent shows it
        (folder / "error.txt").write_text(traceback.format_exc())
        os._exit(1)


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Bit-identical; NaN equals NaN."""
    return torch.equal(torch.nan_to_num(first), torch.nan_to_num(second))


def check_whole(folder: Path) -> list[str]:
    """Names of files that are there, each of them whole; what is only on its way to be a file is none."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".tmp")
    for name in names:
        path = folder / name
        if path.suffix == ".ckpt":
            assert torch.load(path, weights_only=True)["state_dict"]
        elif path.suffix == ".onnx":
            onnx.checker.check_model(onnx.load(path), full_check=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
    return names


def main(folder: Path, checkpoint: str, kills: int) -> None:
    """Kill as often in every phase, resume, compare with the run that nobody killed."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    whole = folder / "whole"
    whole.mkdir()
    assert child(whole, checkpoint) == 0, (whole / "error.txt").read_text()
    expected = torch.load(whole / "found.pt", weights_only=True)
    spans = json.loads((whole / "spans.json").read_text())
    draw = random.Random(os.environ.get("QBN_SEED", checkpoint))
    print(f"calls: { {name: sum(b - a for a, b in s) for name, s in spans.items()} }", flush=True)
    for phase in PHASES:
        moments = [range(first, last) for first, last in spans[phase] if last > first]
        for number in range(kills):
            here = folder / f"{phase}{number}"
            here.mkdir()
            fatal = draw.choice(draw.choices(moments, [len(span) for span in moments])[0])
            code = child(here, checkpoint, fatal + 1)
            assert code == -signal.SIGKILL, f"{phase} {fatal}: ended with {code}"
            before = check_whole(here)
            code = child(here, checkpoint)
            assert code == 0, f"{phase} {fatal}: {(here / 'error.txt').read_text()}"
            check_whole(here)
            assert not list(here.glob("*.tmp")), f"{phase} {fatal}: {list(here.iterdir())}"
            found = torch.load(here / "found.pt", weights_only=True)
            assert found.keys() == expected.keys()
            epochs = int(found.pop("trained")) // 48
            different = [
                n
                for n, v in expected.items()
                if n != "trained" and not torch.equal(torch.nan_to_num(v), torch.nan_to_num(found[n]))
            ]
            assert not different, f"{phase} {fatal}: {different}"
            print(f"killed in {phase} at call {fatal}, with {before}, {epochs} epochs left: the same", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
