"""The configuration: what it accepts, what it refuses, and how overrides find their layers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lightning_qbn import ConfigurationError, QuantizationConfig
from lightning_qbn.config import as_config, matches

LAYERS = ["features.stem.conv", "features.stem.bn", "features.blocks.0.conv", "head.fc", "overhead"]


@pytest.mark.parametrize(("field", "low", "high"), [("weight_bits", 2, 8), ("activation_bits", 2, 16)])
def test_bits_have_a_range(field, low, high):
    for bits in (low, high):
        assert getattr(QuantizationConfig(**{field: bits}), field) == bits
    for bits in (low - 1, high + 1, 0, -4):
        with pytest.raises(ConfigurationError, match=rf"{field} .*{low} to {high}.*{bits}"):
            QuantizationConfig(**{field: bits})


@pytest.mark.parametrize("field", ["weight_bits", "activation_bits"])
@pytest.mark.parametrize("value", ["4", 4.0, True, [4]])
def test_bits_of_another_type_are_refused(field, value):
    with pytest.raises(ConfigurationError, match=field):
        QuantizationConfig(**{field: value})


def test_none_means_float_for_activations_only():
    assert QuantizationConfig(activation_bits=None).activation_bits is None
    with pytest.raises(ConfigurationError, match="weight_bits"):
        QuantizationConfig(weight_bits=None)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_granularity": "channel"},
        {"scale": "LSQ"},
        {"scale": None},
        {"range_estimator": 3},
        {"activation_symmetric": "false"},
        {"activation_symmetric": 1},
        {"skip": "aux*"},
        {"skip": [1]},
        {"skip": None},
        {"skip": 5},
        {"overrides": ["head"]},
        {"overrides": None},
        {"overrides": {"head": 8}},
        {"overrides": {"head": "weight_bits"}},
        {"overrides": {3: {"weight_bits": 4}}},
    ],
    ids=str,
)
def test_wrong_values_are_refused_with_the_name_of_the_field(fields):
    (name,) = fields
    with pytest.raises(ConfigurationError, match=name):
        QuantizationConfig(**fields)


@pytest.mark.parametrize("setting", ["weight_bit", "skip", "overrides"])
def test_override_of_an_unknown_setting_is_refused(setting):
    with pytest.raises(ConfigurationError, match=rf"'head'.*'{setting}'.*weight_bits"):
        QuantizationConfig(overrides={"head": {setting: 4}})


def test_override_of_a_wrong_value_names_its_pattern():
    with pytest.raises(ConfigurationError, match=r"'head'.*weight_bits.*99"):
        QuantizationConfig(overrides={"head": {"weight_bits": 99}})


def test_later_overrides_win_and_earlier_settings_stay():
    config = QuantizationConfig(
        weight_bits=4,
        overrides={"*conv": {"weight_bits": 3, "scale": "observed"}, "*.stem": {"weight_bits": 8}, "head": {}},
    )
    stem = config.for_layer("features.stem.conv")
    assert (stem.weight_bits, stem.scale) == (8, "observed")
    assert config.for_layer("features.blocks.0.conv").weight_bits == 3
    assert config.for_layer("head.fc").weight_bits == 4
    # The other way round the general pattern has the last word.
    turned = QuantizationConfig(overrides=dict(reversed(config.overrides.items())))
    assert turned.for_layer("features.stem.conv").weight_bits == 3


def test_override_can_leave_activations_in_float():
    config = QuantizationConfig(overrides={"head": {"activation_bits": None}})
    assert config.for_layer("head.fc").activation_bits is None
    assert config.for_layer("overhead").activation_bits == 8


def test_skip_by_name_of_the_layer_or_of_its_container():
    config = QuantizationConfig(skip=["head", "*.stem.*"])
    assert [name for name in LAYERS if config.skips(name)] == ["features.stem.conv", "features.stem.bn", "head.fc"]


@pytest.mark.parametrize("fields", [{"skip": ("heat*", "x")}, {"overrides": {"heat": {"weight_bits": 8}}}], ids=str)
def test_pattern_without_a_layer_is_an_error_that_names_the_nearest(fields):
    config = QuantizationConfig(**fields)
    with pytest.raises(ConfigurationError, match=r"'heat.*no layer.*head\.fc"):
        config.check_patterns(LAYERS)
    QuantizationConfig(skip=("head",), overrides={"*.conv": {}}).check_patterns(LAYERS)


@given(st.lists(st.sampled_from(["stem", "head", "0", "conv"]), min_size=1, max_size=4), st.data())
def test_a_pattern_without_wildcards_matches_the_module_and_everything_inside(parts, data):
    name = ".".join(parts)
    cut = data.draw(st.integers(1, len(parts)))
    assert matches(".".join(parts[:cut]), name)
    assert not matches(name + ".deeper", name)
    assert not matches("x" + name, name)
    assert matches(name, "_orig_mod." + name)  # the name that torch.compile gives


def test_plain_data_and_back():
    config = QuantizationConfig(4, None, overrides={"head": {"weight_bits": 8}}, skip=("aux*",), scale="observed")
    plain = json.loads(json.dumps(config.to_dict()))
    assert set(plain) == {f.name for f in dataclasses.fields(QuantizationConfig)}
    assert as_config(plain) == config
    assert as_config(OmegaConf.create(plain)) == config
    assert json.dumps(as_config(OmegaConf.create(plain)).to_dict()) == json.dumps(plain)


def test_to_dict_gives_a_copy():
    config = QuantizationConfig(overrides={"head": {"weight_bits": 8}})
    config.to_dict()["overrides"]["head"]["weight_bits"] = 2
    assert config.for_layer("head").weight_bits == 8


def test_as_config():
    config = QuantizationConfig(weight_bits=3)
    assert as_config(config) is config
    assert as_config(None) == QuantizationConfig()
    with pytest.raises(ConfigurationError, match=r"'weight_bit'.*Nearest: weight_bits"):
        as_config({"weight_bit": 4})
    with pytest.raises(ConfigurationError, match="mapping"):
        as_config("weight_bits=4")


def test_frozen_and_independent_of_the_mapping_it_was_made_from():
    overrides = {"head": {"weight_bits": 8}}
    config = QuantizationConfig(overrides=overrides)
    overrides["head"]["weight_bits"] = 2
    assert config.for_layer("head").weight_bits == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bits = 2
