"""Two processes with half of the data each have the statistics of one process with all of it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_sequential import Exits, Later, mobile
from torch import nn

from lightning_qbn import QuantizationConfig, calibrate_quantizers, insert_quantizers, reestimate_batch_norms

STATISTICS = ("running_mean", "running_var")


def batches_of(seed: int, *sizes: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 1, 8, 8, generator=generator) + 0.1 * seed for n in sizes]


def network_of(kind: str) -> nn.Module:
    torch.manual_seed(5)
    network: nn.Module = {"later": Later, "exits": Exits}.get(kind, mobile)()
    if kind == "quantized":
        insert_quantizers(network, QuantizationConfig(3, 8))
        calibrate_quantizers(network, batches_of(9, 16))
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if kind == "synchronised" else network


def positive(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.abs() for x in batches]


EVEN, UNEVEN = (batches_of(0, 8, 8, 8), batches_of(1, 8, 8, 8)), (batches_of(0, 8, 5, 9), batches_of(1, 3))
CASES: dict[str, tuple[str, tuple[list[torch.Tensor], ...], dict[str, Any]]] = {
    "joint": ("mobile", EVEN, {}),
    "population": ("mobile", UNEVEN, {"estimator": "population"}),
    "sequential": ("mobile", UNEVEN, {"mode": "sequential"}),
    "sequential, little memory": ("mobile", UNEVEN, {"mode": "sequential", "memory_gib": 0.0}),
    "quantized": ("quantized", EVEN, {"mode": "sequential"}),
    "synchronised": ("synchronised", EVEN, {"mode": "sequential"}),
    "synchronised, joint": ("synchronised", EVEN, {}),
    "out of step on one rank": ("later", (batches_of(0, 8, 8), batches_of(1, 8, 9)), {"mode": "sequential"}),
    "a layer of one rank": ("exits", (positive(EVEN[0]), [-x.abs() for x in EVEN[1]]), {"mode": "sequential"}),
    "a layer of one rank, joint": ("exits", (positive(EVEN[0]), [-x.abs() for x in EVEN[1]]), {}),
}


def with_nan(batches: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*batches[:2], torch.full_like(batches[2], torch.nan)]


def broken() -> Any:
    yield EVEN[1][0]
    raise OSError("disk full")


FAILURES: dict[str, tuple[Any, str]] = {
    "nan": (lambda: with_nan(EVEN[1]), r"stem\.1 saw NaN or infinity in batch 2"),
    "empty": (lambda: [], "no batch"),
    "loader": (broken, "disk full"),
}


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items() if k.endswith(STATISTICS)}


def work(rank: int, folder: str) -> None:
    """What a rank does; everything that it finds goes to a file."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, (kind, halves, settings) in CASES.items():
        network = network_of(kind)
        result = reestimate_batch_norms(network, halves[rank], 9, **settings)
        found[name] = state_of(network), result.num_batches, result.standard_error, sorted(result.skipped)
    for name, (loader, _) in FAILURES.items():
        for mode in ("joint", "sequential"):
            network = network_of("mobile")
            before = state_of(network)
            try:
                reestimate_batch_norms(network, EVEN[0] if rank == 0 else loader(), 9, mode)
            except Exception as error:  # noqa: BLE001  compared below
                same = all(torch.equal(before[k], v) for k, v in state_of(network).items())
                found[name, mode] = type(error).__name__, str(error), same
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(work, (str(folder),), nprocs=2, start_method="spawn")
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:The loader gave", "ignore:The batches are no random")
def test_statistics_are_those_of_one_process(name, ranks):
    kind, halves, settings = CASES[name]
    network = network_of(kind)
    result = reestimate_batch_norms(network, [*halves[0], *halves[1]], 99, **settings)
    (first, used, error, skipped), (second, _, other_error, _) = (rank[name] for rank in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)  # to the bit
    for key, value in state_of(network).items():
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6 * float(value.abs().mean()))
    assert used == len(halves[0])
    assert error == other_error == pytest.approx(result.standard_error, rel=1e-5)
    assert skipped == []


@pytest.mark.parametrize("mode", ["joint", "sequential"])
@pytest.mark.parametrize("name", FAILURES)
def test_failure_of_one_rank_is_an_error_on_both(name, mode, ranks):
    for rank, found in enumerate(ranks):
        kind, message, restored = found[name, mode]
        assert kind == "ReestimationError"
        assert ("Rank 1 failed" in message) == (rank == 0)
        assert FAILURES[name][1].replace("\\", "") in message
        assert restored
