"""The garbage collector is as it was, whatever happened."""

from __future__ import annotations

import gc

import pytest
from torch import nn

from lightning_qbn import QuantizationConfig, UnsupportedNetworkError, insert_quantizers
from lightning_qbn.garbage import collected_later


@pytest.mark.parametrize("enabled", [True, False])
def test_collector_is_as_before(enabled):
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with collected_later():
            assert not gc.isenabled()
            with collected_later():
                pass
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(UnsupportedNetworkError):
            insert_quantizers(nn.ReLU(), QuantizationConfig())
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if before else gc.disable()
