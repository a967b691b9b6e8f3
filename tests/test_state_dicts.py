"""A state_dict of one form does not load into a network of the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from lightning_qbn import (
    ConfigurationError,
    QuantizationConfig,
    calibrate_quantizers,
    fold_batch_norms,
    insert_quantizers,
)


@pytest.fixture
def folded(network, batches):
    insert_quantizers(network, QuantizationConfig(weight_bits=4))
    calibrate_quantizers(network.eval(), batches)
    return fold_batch_norms(network)


def test_each_form_loads_its_own(network, folded, batches):
    other = copy.deepcopy(folded)
    for layer in other.modules():
        if hasattr(layer, "weight_integers"):
            layer.weight_integers.zero_()
    assert not torch.equal(other(batches[0]), folded(batches[0]))
    other.load_state_dict(pickle.loads(pickle.dumps(folded.state_dict())))
    assert torch.equal(other(batches[0]), folded(batches[0]))
    network.load_state_dict(copy.deepcopy(network).state_dict())


@pytest.mark.parametrize("strict", [True, False])
def test_the_other_form_is_refused_by_name(network, folded, batches, strict):
    before = network(batches[0])
    with pytest.raises(ConfigurationError, match=r"folded network: stem\.0 has integers there"):
        network.load_state_dict(folded.state_dict(), strict=strict)
    with pytest.raises(ConfigurationError, match=r"not folded: stem\.0 has a weight there"):
        folded.load_state_dict(network.state_dict(), strict=strict)
    assert torch.equal(network(batches[0]), before)


def test_a_part_of_the_state_loads(folded):
    part = {key: value for key, value in folded.state_dict().items() if key.startswith("head.")}
    result = folded.load_state_dict(part, strict=False)
    assert not result.unexpected_keys
