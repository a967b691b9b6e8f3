"""Running batches through a network and leaving no trace."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from lightning_qbn import CalibrationError, ConfigurationError, DataError, QuantizationError, ReestimationError
from lightning_qbn.passes import check_num_batches, default_forward, forward, load, quiet

Pair = namedtuple("Pair", "image label")


@pytest.fixture
def doubler():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    return Double()


@pytest.mark.parametrize(
    "form", [lambda x: x, lambda x: (x, 1), lambda x: [x, "y"], lambda x: Pair(x, 0), lambda x: (x,)]
)
def test_default_forward_takes_the_first_element(doubler, form):
    x = torch.randn(3)
    assert torch.equal(default_forward(doubler, form(x)), 2 * x)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"image": torch.ones(1), "label": 3}, r"a dict with the keys \['image', 'label'\]"),
        (["a", "b"], "a list that starts with a str"),
        ((), "a tuple that is empty"),
        ([], "a list that is empty"),
        ([(torch.ones(1),)], "a list that starts with a tuple"),
        ([{"image": 1}], "a list that starts with a dict"),
        (None, "a NoneType"),
        ("text", "a str"),
        (3, "a int"),
    ],
)
def test_other_forms_are_an_error_that_shows_the_way(doubler, batch, text):
    with pytest.raises(DataError, match=rf"A batch is {text}; expected a tensor.*forward_fn, such as: lambda"):
        default_forward(doubler, batch)


def test_the_input_goes_to_the_device_of_the_network():
    network = nn.Linear(3, 2, device="meta")
    assert default_forward(network, torch.randn(4, 3)).device.type == "meta"


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "3", None])
def test_number_of_batches(value):
    with pytest.raises(ConfigurationError, match=rf"at least 1, found {value!r}"):
        check_num_batches(value)
    with pytest.raises(ReestimationError):
        check_num_batches(value, ReestimationError)
    check_num_batches(1)


@pytest.mark.parametrize("exception", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("training", [True, False])
def test_quiet_brings_modes_gradients_and_random_numbers_back(exception, training):
    network = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)), nn.ReLU())
    network.train(training)
    network[1][0].train(not training)
    modes, random = [m.training for m in network.modules()], torch.get_rng_state()
    try:
        with quiet(network):
            assert not any(m.training for m in network.modules())
            assert not network(torch.randn(3, 2)).requires_grad
            if exception:
                raise exception
    except (RuntimeError, KeyboardInterrupt):
        assert exception
    assert [m.training for m in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()


def test_results_made_in_a_quiet_pass_are_no_inference_tensors():
    network = nn.BatchNorm1d(2)
    with quiet(network):
        network.running_mean.copy_(network(torch.randn(4, 2)).mean(0))
    assert not network.running_mean.is_inference()
    network(torch.randn(4, 2)).sum().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # within torch._dynamo
def test_hooks_run_in_a_compiled_network_too():
    network = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    compiled = torch.compile(network, backend="eager")
    compiled(torch.randn(2, 3))
    seen = []
    handle = network[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with quiet(network):
        compiled(torch.randn(2, 3))
    handle.remove()
    assert len(seen) == 1


def run(network, batches, num_batches, forward_fn, error):
    """Pass batches as the callers do; yields the index of each that is through."""
    for index, batch in load(batches, num_batches, error):
        forward(network, batch, index, forward_fn, error)
        yield index


def test_run_counts_and_reads_no_further_than_needed(doubler):
    endless = iter(lambda: torch.ones(2), None)
    assert list(run(doubler, endless, 3, None, CalibrationError)) == [0, 1, 2]
    generator = (torch.full((1,), i) for i in range(5))
    assert list(run(doubler, generator, 2, None, CalibrationError)) == [0, 1]
    assert next(generator).item() == 2
    assert list(run(doubler, [torch.ones(1)], 3, None, CalibrationError)) == [0]
    assert next(generator).item() == 3


@pytest.mark.parametrize("error", [CalibrationError, ReestimationError])
def test_run_names_the_failing_batch_and_the_cause(doubler, error):
    def loader():
        yield torch.ones(1)
        raise OSError("disk full")

    def fail(network, batch):
        raise KeyError("image")

    with pytest.raises(error, match="Batch 1 could not be loaded: OSError: disk full") as caught:
        list(run(doubler, loader(), 9, None, error))
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(error, match="Batch 0 failed in the forward pass: KeyError: 'image'"):
        list(run(doubler, [1], 9, fail, error))
    with pytest.raises(error, match="no batch"):
        list(run(doubler, [], 9, None, error))


def test_run_lets_our_own_errors_and_interrupts_through(doubler):
    def fail(network, batch):
        raise batch

    for exception in (QuantizationError("ours"), KeyboardInterrupt("stop"), SystemExit(1)):
        with pytest.raises(type(exception)) as caught:
            list(run(doubler, [exception], 1, fail, CalibrationError))
        assert caught.value is exception


def test_a_loader_that_cannot_start_is_an_error_of_ours(doubler):
    class Loader:
        def __iter__(self):
            raise OSError("no such folder")

    with pytest.raises(CalibrationError, match=r"could not be loaded: OSError: no such folder"):
        list(run(doubler, Loader(), 1, None, CalibrationError))
