"""Re-estimation of batch-norm statistics against plain torch and against the definition of the fixed point."""

from __future__ import annotations

import copy
import math
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from lightning_qbn import (
    DataError,
    QuantizationConfig,
    QuantizationWarning,
    ReestimationError,
    calibrate_quantizers,
    insert_quantizers,
    reestimate_batch_norms,
)

few = settings(max_examples=15, deadline=None)
MODES = ["joint", "sequential"]
modes = pytest.mark.parametrize("mode", MODES)


def norms(network):
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def everything(network):
    """All that must not change: parameters, buffers, flags, momenta, gradients, random state, hooks."""
    state = {k: v.clone() for k, v in network.state_dict().items()}
    flags = [(m.training, getattr(m, "momentum", 0), len(m._forward_pre_hooks)) for m in network.modules()]
    return (
        state,
        flags,
        [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        torch.get_rng_state(),
    )


def assert_as_before(network, before, but=()):
    state, flags, grads, random = everything(network)
    assert [k for k in state if not k.endswith(but) and not torch.equal(state[k], before[0][k])] == []
    assert flags == before[1]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(grads, before[2], strict=True))
    assert torch.equal(random, before[3])


STATISTICS = ("running_mean", "running_var")


def inputs_of(network, name, batches):
    """What a batch-norm gets in the inference graph, as one float64 tensor (values, channels)."""
    seen = []
    module = network.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    training = [(m, m.training) for m in network.modules()]
    network.eval()
    with torch.no_grad():
        for x in batches:
            network(x)
    handle.remove()
    for m, flag in training:
        m.training = flag
    return torch.cat([x.double().transpose(0, 1).flatten(1).T for x in seen])


def assert_statistics_of(bn, values):
    """To 1e-6: of the variance, and of a mean that is not zero."""
    torch.testing.assert_close(bn.running_mean.double(), values.mean(0), rtol=1e-6, atol=1e-6 * float(values.std()))
    torch.testing.assert_close(bn.running_var.double(), values.var(0), rtol=1e-6, atol=0)


def convnet(*between):
    return nn.Sequential(nn.Conv2d(1, 6, 3), *between, nn.BatchNorm2d(6), nn.ReLU())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_joint_mean_of_batches_is_what_torch_averages_with_momentum_none(batches, momentum):
    network = convnet()
    network[1].momentum = momentum
    with torch.no_grad():
        reference = nn.BatchNorm2d(6, momentum=None)
        for x in batches:
            reference(network[0](x))
    reestimate_batch_norms(network, batches, 4)
    torch.testing.assert_close(network[1].running_mean, reference.running_mean)
    torch.testing.assert_close(network[1].running_var, reference.running_var)


def test_joint_on_a_deep_network_is_what_torch_averages(network, batches):
    reference = copy.deepcopy(network).eval()
    for bn in norms(reference).values():
        bn.train()
        bn.momentum = None
        bn.reset_running_stats()
    with torch.no_grad():
        for x in batches:
            reference(x)
    reestimate_batch_norms(network, batches, 4)
    for name, bn in norms(network).items():
        torch.testing.assert_close(bn.running_mean, norms(reference)[name].running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bn.running_var, norms(reference)[name].running_var, rtol=1e-4, atol=1e-5)


@modes
@pytest.mark.filterwarnings("ignore:The batches are no random draws")
@few
@given(seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_population_of_the_first_layer_is_that_of_all_images(mode, seed, sizes):
    torch.manual_seed(seed)
    network = convnet()
    batches = [torch.randn(n, 1, 6, 6) * (k + 1) + 3 * k for k, n in enumerate(sizes)]
    values = inputs_of(network, "1", batches)
    reestimate_batch_norms(network, batches, len(sizes), mode, "population")
    assert_statistics_of(network[1], values)


@pytest.mark.parametrize("scale", [None, "learned", "observed"])
def test_sequential_is_the_fixed_point_of_the_inference_graph(network, batches, scale):
    if scale:
        insert_quantizers(network, QuantizationConfig(3, 4, scale=scale))
        calibrate_quantizers(network, batches)
    before = everything(network)
    result = reestimate_batch_norms(network, batches, 4, "sequential")
    assert_as_before(network, before, but=STATISTICS)  # in particular the ranges of all quantizers
    assert len(result.layers) == len(norms(network))
    for name, bn in norms(network).items():
        assert_statistics_of(bn, inputs_of(network, name, batches))


def test_sequential_does_not_depend_on_batch_size_or_order(network, batches):
    images = torch.cat(batches)
    found = []
    for data in (batches, [images], images[torch.randperm(32)].split(3), images.split(1)):
        with reestimate_batch_norms(network, data, len(data), "sequential"):
            found.append({k: v.clone() for k, v in network.state_dict().items() if k.endswith(STATISTICS)})
    for other in found[1:]:
        for key, value in found[0].items():
            torch.testing.assert_close(other[key], value, rtol=1e-4, atol=1e-5)


@modes
@pytest.mark.parametrize("training", [True, False])
def test_only_the_statistics_change_and_dropout_is_off(batches, mode, training):
    network = nn.Sequential(
        convnet(nn.Dropout(0.9)), nn.Dropout(0.9), nn.Flatten(), nn.LazyLinear(4), nn.BatchNorm1d(4)
    )
    network[0][2].momentum = None
    network(batches[0]).square().sum().backward()
    network.train(training)
    network[1].train(not training)
    before = everything(network)
    buffers = [bn.running_mean for bn in norms(network).values()]
    reestimate_batch_norms(network, batches, 4, mode)
    assert_as_before(network, before, but=STATISTICS)
    assert all(bn.running_mean is buffer for bn, buffer in zip(norms(network).values(), buffers, strict=True))
    assert all(
        not torch.equal(network.state_dict()[f"{n}.running_var"], before[0][f"{n}.running_var"]) for n in norms(network)
    )
    values = inputs_of(network, "0.2", batches)  # in eval mode: without dropout
    torch.testing.assert_close(network[0][2].running_mean.double(), values.mean(0), rtol=1e-5, atol=1e-5)


def broken_loader(batches):
    yield batches[0]
    raise OSError("disk full")


def interrupted(batches):
    yield batches[0]
    raise KeyboardInterrupt


def with_nan(batches):
    batches[2][3, 0, 4, 4] = float("nan")
    return batches


@modes
@pytest.mark.parametrize(
    ("loader", "error", "text"),
    [
        (list, None, None),
        (with_nan, ReestimationError, r"stem\S* saw NaN or infinity in batch 2\."),
        (lambda b: [*b, torch.zeros(2, 3, 8, 8)], ReestimationError, "Batch 4 failed in the forward pass.*channels"),
        (broken_loader, ReestimationError, "Batch 1 could not be loaded: OSError: disk full"),
        (lambda b: [], ReestimationError, "no batch"),
        (lambda b: [{"image": b[0]}], DataError, "forward_fn"),
        (interrupted, KeyboardInterrupt, None),
    ],
    ids=["fine", "nan", "shape", "loader", "empty", "form", "interrupt"],
)
def test_nothing_is_left_behind_by_an_exception(network, batches, mode, loader, error, text):
    network.train()
    before = everything(network)
    if error is None:
        with reestimate_batch_norms(network, loader(batches), 4, mode):
            pass
    else:
        with pytest.raises(error, match=text):
            reestimate_batch_norms(network, loader(batches), 9, mode)
    assert_as_before(network, before)


@modes
@pytest.mark.parametrize(
    ("exception", "expected"),
    [(RuntimeError("late"), ReestimationError), (KeyboardInterrupt("late"), KeyboardInterrupt)],
)
def test_failure_in_a_late_pass_brings_everything_back(network, batches, mode, exception, expected):
    calls = []

    def fail(module, args):
        calls.append(args)
        if len(calls) == 4:  # of 4 batches: by then sequential mode has set the layers above
            raise exception

    handle = network.last[0].register_forward_pre_hook(fail)
    before = everything(network)
    with pytest.raises(expected, match="late"):
        reestimate_batch_norms(network, batches, 4, mode)
    assert_as_before(network, before)
    handle.remove()
    reestimate_batch_norms(network, batches, 4, mode)


@modes
def test_undo_redo_and_with_are_exact(network, batches, mode):
    before = everything(network)
    result = reestimate_batch_norms(network, batches, 4, mode)
    new = everything(network)
    with pytest.raises(ZeroDivisionError), result as entered:
        _ = 1 / (entered is not result)
    assert_as_before(network, before)
    result.redo()
    assert_as_before(network, new)
    reestimate_batch_norms(network, [x * 5 for x in batches], 4, mode)
    result.undo()
    result.undo()
    assert_as_before(network, before)


def test_short_loader_warns_with_both_numbers(network, batches):
    with pytest.warns(QuantizationWarning, match=r"4 batches.*num_batches=7"):
        assert reestimate_batch_norms(network, batches, 7).num_batches == 4


@modes
def test_generators_without_length_are_read_no_further_than_needed(network, batches, mode):
    generator = ((batch, "label") for batch in batches)
    assert reestimate_batch_norms(network, generator, 3, mode).num_batches == 3
    assert torch.equal(next(generator)[0], batches[3])


@modes
def test_layers_that_keep_their_statistics_are_named_with_the_reason(batches, mode):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.used, self.unused = convnet(), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
            self.free = nn.BatchNorm2d(6, track_running_stats=False)

        def forward(self, x):
            return self.free(self.used(self.frozen(x)))

    network = Net()
    network.frozen.eval()
    before = everything(network)
    with pytest.warns(QuantizationWarning, match=r"frozen\.1 is frozen.*unused was reached by no batch"):
        result = reestimate_batch_norms(network, batches, 4, mode)
    assert set(result.skipped) == {"frozen.1", "free", "unused"}
    assert "no running statistics" in result.skipped["free"]
    assert [layer.name for layer in result.layers] == ["used"]
    assert_as_before(network, before, but=("used.running_mean", "used.running_var"))
    # In a network that is in eval mode as a whole nothing is frozen on its own.
    with pytest.warns(QuantizationWarning):
        assert "frozen.1" not in reestimate_batch_norms(network.eval(), batches, 4, mode).skipped


@modes
@pytest.mark.parametrize(
    "network", [nn.Linear(8, 2), nn.BatchNorm2d(1, track_running_stats=False)], ids=["none", "free"]
)
def test_no_batch_norm_warns_and_changes_nothing(network, batches, mode):
    before = everything(network)
    with pytest.warns(QuantizationWarning, match=r"no batch-norm statistics to re-estimate.*Nothing has changed"):
        result = reestimate_batch_norms(network, batches, 4, mode)
    assert (result.layers, result.num_batches) == ([], 0)
    assert_as_before(network, before)


class Twice(nn.Module):
    """One batch-norm used for two inputs, by long batches at least."""

    def __init__(self, shortest=0):
        super().__init__()
        self.first, self.second, self.bn = nn.Linear(4, 3), nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.shortest = shortest

    def forward(self, x):
        return self.bn(self.first(x)) + self.bn(self.second(x)) if len(x) >= self.shortest else self.first(x)


@modes
def test_both_calls_of_a_shared_batch_norm_count(mode):
    network, batches = Twice(), [torch.randn(n, 4) for n in (9, 5)]
    reestimate_batch_norms(network, batches, 2, mode, "population")
    x = torch.cat(batches)
    both = torch.cat([network.first(x), network.second(x)]).detach()
    torch.testing.assert_close(network.bn.running_mean, both.mean(0))
    torch.testing.assert_close(network.bn.running_var, both.var(0))


@modes
def test_calls_count_also_where_some_batches_take_another_path(mode):
    network, batches = Twice(shortest=8), [torch.randn(n, 4) for n in (9, 5)]
    reestimate_batch_norms(network, batches, 2, mode, "population")
    both = torch.cat([network.first(batches[0]), network.second(batches[0])]).detach()
    torch.testing.assert_close(network.bn.running_mean, both.mean(0))
    torch.testing.assert_close(network.bn.running_var, both.var(0))


class OneByOne(nn.Module):
    """A batch-norm after global pooling: with one image a single value per channel."""

    def __init__(self, shared=False):
        super().__init__()
        self.conv, self.bn, self.shared = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), shared

    def forward(self, x):
        y = self.bn(F.adaptive_avg_pool2d(self.conv(x), 1))
        return self.bn(y) if self.shared else y


def test_one_value_per_channel():
    network, batches = OneByOne(), list(torch.randn(20, 1, 1, 6, 6))
    before = everything(network)
    with pytest.raises(ReestimationError, match=r"bn gets one value per channel in batch 0.*mode='sequential'"):
        reestimate_batch_norms(network, batches, 20)
    assert_as_before(network, before)
    reestimate_batch_norms(network, batches, 20, "sequential")
    values = inputs_of(network, "bn", batches)
    torch.testing.assert_close(network.bn.running_var.double(), values.var(0), rtol=1e-5, atol=1e-7)


@modes
def test_one_value_per_channel_in_a_shared_batch_norm_is_an_error_of_ours(mode):
    network, batches = OneByOne(shared=True), list(torch.randn(2, 1, 1, 6, 6))
    before = everything(network)
    with pytest.raises(ReestimationError, match="bn gets one value per channel"):
        reestimate_batch_norms(network, batches, 2, mode)
    assert_as_before(network, before)


@modes
def test_a_forward_that_catches_exceptions_does_not_disturb(network, batches, mode):
    reference = reestimate_batch_norms(network, batches, 4, mode)
    expected = everything(network)
    reference.undo()

    def forward(net, batch):
        try:
            net(batch)
        except Exception:  # noqa: BLE001  as a user's forward may do
            net(batch * 1000)

    reestimate_batch_norms(network, batches, 4, mode, forward_fn=forward)
    assert_as_before(network, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_batches": 0},
        {"num_batches": -1},
        {"num_batches": True},
        {"num_batches": 1.5},
        {"mode": "parallel"},
        {"estimator": "ema"},
        {"tolerance": 0},
        {"tolerance": -0.1},
        {"tolerance": float("nan")},
        {"memory_gib": -1.0},
        {"memory_gib": float("nan")},
    ],
    ids=str,
)
def test_settings_are_checked_before_the_first_batch(network, arguments):
    with pytest.raises(ReestimationError, match=next(iter(arguments))):
        reestimate_batch_norms(network, None, **arguments)


@modes
def test_default_estimators(batches, mode):
    shifted = [x * (1 + k) for k, x in enumerate(batches)]  # variances differ, means do not
    by_default, by_name = convnet(), convnet()
    by_name.load_state_dict(by_default.state_dict())
    reestimate_batch_norms(by_default, shifted, 4, mode)
    reestimate_batch_norms(by_name, shifted, 4, mode, {"joint": "mean_of_batches", "sequential": "population"}[mode])
    assert torch.equal(by_default[1].running_var, by_name[1].running_var)


@modes
def test_tolerance_stops_early_and_says_nothing(mode):
    network, batches = convnet(), list(torch.randn(40, 16, 1, 8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loose = reestimate_batch_norms(network, batches, 40, mode, tolerance=10.0)
        tight = reestimate_batch_norms(network, batches, 40, mode, tolerance=0.02)
    assert loose.num_batches == 5 < tight.num_batches < 40
    assert tight.standard_error < 0.02 < loose.standard_error
    assert reestimate_batch_norms(network, batches, 1, mode).standard_error is None


@modes
def test_tolerance_that_is_not_reached_is_said_with_what_was(mode):
    batches = list(torch.randn(7, 16, 1, 8, 8))
    with pytest.warns(
        QuantizationWarning, match=r"standard error .* is 0\.\d+ with 7 batches, not below tolerance=1e-09"
    ):
        result = reestimate_batch_norms(convnet(), batches, 7, mode, tolerance=1e-9)
    assert result.num_batches == 7
    with pytest.warns(QuantizationWarning, match="single batch"):
        reestimate_batch_norms(convnet(), batches, 1, mode, tolerance=1e-9)


def test_standard_error_is_how_far_independent_samples_lie_apart():
    network, found, errors = convnet(), [], []
    for _ in range(40):
        with reestimate_batch_norms(network, list(torch.randn(10, 16, 1, 8, 8)), 10) as result:
            found.append((network[1].running_mean / network[1].running_var.sqrt(), network[1].running_var.clone()))
            errors.append(result.standard_error)
    mean, variance = (torch.stack(values) for values in zip(*found, strict=True))
    apart = torch.maximum(mean.std(0), variance.std(0) / variance.mean(0))
    assert sum(errors) / 40 == pytest.approx(float(apart.quantile(0.95)), rel=0.3)


def test_drift_by_hand():
    network = nn.Sequential(nn.BatchNorm1d(2, eps=0.5))
    network[0].running_mean[:] = torch.tensor([1.0, 0.0])
    network[0].running_var[:] = torch.tensor([3.5, 0.5])
    x = torch.tensor([[5.0, 1.0], [7.0, 3.0]])  # means 6, 2; unbiased variances 2, 2
    (drift,) = reestimate_batch_norms(network, [x], 1).layers
    assert (drift.name, drift.channels, drift.depthwise) == ("0", 2, False)
    assert drift.mean_shift == pytest.approx((5 / 2 + 2 / 1) / 2)
    assert drift.variance_ratio == pytest.approx(math.sqrt(2.5 / 4 * 2.5 / 1))
    first = 0.5 * (2.5 / 4 + 25 / 4 - 1 - math.log(2.5 / 4))
    second = 0.5 * (2.5 + 4 - 1 - math.log(2.5))
    assert drift.kl == pytest.approx((first + second) / 2)


@modes
def test_drift_table_is_sorted_and_a_second_time_there_is_no_drift(network, batches, mode):
    layers = reestimate_batch_norms(network, batches, 4, mode).layers
    assert [layer.kl for layer in layers] == sorted((layer.kl for layer in layers), reverse=True)
    assert {layer.name for layer in layers} == set(norms(network))
    again = reestimate_batch_norms(network, batches, 4, mode).layers
    assert all(layer.kl == pytest.approx(0, abs=1e-9) and layer.mean_shift < 1e-5 for layer in again)


@pytest.mark.parametrize(
    ("layer", "depthwise"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 8, 3, groups=4), True),  # torch's own definition: groups == in_channels
        (nn.ConvTranspose2d(4, 4, 3, groups=4), True),
        (nn.Conv2d(4, 4, 3, groups=2), False),
        (nn.Conv2d(4, 4, 3), False),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)), False),
        (nn.Sequential(nn.Conv2d(4, 1, 1), nn.Conv2d(1, 4, 3)), False),
        (nn.Identity(), False),
    ],
    ids=str,
)
def test_depthwise_layers_are_marked(layer, depthwise):
    x = torch.randn(3, 4, 8, 8)
    network = nn.Sequential(layer, nn.BatchNorm2d(layer(x).shape[1]))
    assert reestimate_batch_norms(network, [x], 1).layers[0].depthwise is depthwise


@modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(network, batches, mode, dtype):
    network.to(dtype)
    data = [x.to(dtype) for x in batches]
    reestimate_batch_norms(network, data, 4, mode, "population")
    name, bn = next(iter(norms(network).items()))
    values = inputs_of(network, name, data)
    assert bn.running_var.dtype == dtype
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(bn.running_var.double(), values.var(0), rtol=tolerance, atol=tolerance)


@modes
def test_empty_batch_is_called_empty(network, batches, mode):
    with pytest.raises(ReestimationError, match=r"(?i)batch 1\b.*(empty|no value)|(empty|no value).*batch 1\b"):
        reestimate_batch_norms(network, [batches[0], batches[1][:0]], 2, mode)


@modes
@pytest.mark.parametrize("size", [15, 16])
def test_small_batches_get_the_advice_to_use_sequential_mode(mode, size):
    batches = list(torch.randn(5, size, 1, 8, 8))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reestimate_batch_norms(convnet(), [*batches, torch.randn(size // 2, 1, 8, 8)], 6, mode)  # the last one is short
        reestimate_batch_norms(convnet(), batches, 5, mode)
    texts = [str(w.message) for w in said]
    assert len(texts) == (0 if mode == "sequential" else 2 if size == 15 else 1)
    assert all("fewer than 16 images" in text and "mode='sequential'" in text for text in texts)
    if texts:
        assert texts[-1].startswith("Joint statistics of batches of 15 images" if size == 15 else "Joint statistics of")


@modes
def test_batches_that_are_no_random_draws_get_it_too(mode):
    classes = [torch.randn(16, 1, 8, 8) + k % 2 for k in range(6)]
    mixed = torch.cat(classes)[torch.randperm(96)].split(16)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        reestimate_batch_norms(convnet(), mixed, 6, mode)
        assert not said
        reestimate_batch_norms(convnet(), classes, 6, mode)
    texts = [str(w.message) for w in said]
    assert len(texts) == (mode == "joint")
    if texts:
        assert "means vary" in texts[0]
        assert "16 images" in texts[0]
        assert "mode='sequential'" in texts[0]


def test_undo_finds_layers_that_were_replaced_and_says_when_it_cannot(network, batches):
    before = {k: v.clone() for k, v in network.state_dict().items()}
    result = reestimate_batch_norms(network, batches, 4)
    nn.SyncBatchNorm.convert_sync_batchnorm(network)  # new objects under the old names, as a Trainer makes them
    result.undo()
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    result.redo()
    new = {k: v.clone() for k, v in network.state_dict().items()}
    network.stem[1] = nn.Identity()
    with pytest.raises(ReestimationError, match=r"stem\.1 is no batch-norm of the network any more"):
        result.undo()
    assert all(torch.equal(new[k], v) for k, v in network.state_dict().items())


def test_random_numbers_that_a_loader_draws_come_back(batches):
    def loader():
        for x in batches:
            yield x + 0.01 * (random.random() + float(np.random.rand()) + torch.rand(1))

    network = convnet()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for mode in MODES:
        reestimate_batch_norms(network, loader(), 4, mode)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])


@modes
def test_warning_that_is_an_error_changes_nothing(network, batches, mode):
    before = everything(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(QuantizationWarning):
            reestimate_batch_norms(network, batches, 9, mode)
    assert_as_before(network, before)
