"""A quantsim configuration of AIMET is brought along."""

from __future__ import annotations

import copy
import json
import warnings

import pytest

from lightning_qbn import ConfigurationError, QuantizationConfig, QuantizationWarning

USUAL = {
    "defaults": {
        "hw_version": "default",
        "ops": {"is_output_quantized": "True", "is_symmetric": "False"},
        "params": {"is_quantized": "True", "is_symmetric": "True"},
        "strict_symmetric": "False",
        "per_channel_quantization": "True",
    },
    "params": {"bias": {"is_quantized": "False"}},
    "op_type": {"Squeeze": {"is_output_quantized": "False"}, "Pad": {"is_output_quantized": "False"}},
    "supergroups": [
        {"op_list": ["Conv", "Relu"]},
        {"op_list": ["Conv", "Clip"]},
        {"op_list": ["Conv", "BatchNormalization", "Relu"]},
        {"op_list": ["Add", "Relu"]},
        {"op_list": ["Gemm", "Relu"]},
    ],
    "model_input": {"is_input_quantized": "True"},
    "model_output": {},
}


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        data = copy.deepcopy(USUAL)
        for place, value in changes.items():
            *path, last = place.split("__")
            owner = data
            for key in path:
                owner = owner.setdefault(key, {})
            owner[last] = value
        file = tmp_path / "quantsim.json"
        file.write_text(json.dumps(data))
        return file

    return write


def test_usual_file_is_taken_over_without_a_word(write):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = QuantizationConfig.from_aimet(write(), weight_bits=4)
    assert config == QuantizationConfig(weight_bits=4, activation_bits=8, weight_granularity="per_channel")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"defaults__per_channel_quantization": "False"}, {"weight_granularity": "per_tensor"}),
        ({"defaults__ops__is_symmetric": "True"}, {"activation_symmetric": True}),
        ({"defaults__ops__is_symmetric": True}, {"activation_symmetric": True}),
        ({"defaults__ops": {}}, {"activation_bits": None}),
    ],
)
def test_what_a_file_sets(write, changes, fields):
    assert QuantizationConfig.from_aimet(write(**changes)) == QuantizationConfig(**fields)


def test_settings_come_before_the_file(write):
    config = QuantizationConfig.from_aimet(write(), weight_granularity="per_tensor", skip=["head"])
    assert (config.weight_granularity, config.skip) == ("per_tensor", ("head",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defaults__ops__is_symmetric": "True", "defaults__unsigned_symmetric": "True"}, "unsigned_symmetric"),
        ({"op_type__Gemm": {"per_channel_quantization": "False"}}, "some layer types alone"),
        ({"op_type__Add": {"is_output_quantized": "False"}}, "op_type.Add"),
        ({"model_input": {}}, "model_input in float"),
        (
            {"supergroups": [{"op_list": ["Conv", "Relu"]}, {"op_list": ["Conv", "Relu", "MaxPool"]}]},
            "Conv-Relu-MaxPool",
        ),
        ({"supergroups": [{"op_list": ["Add", "Relu"]}]}, "no supergroup Conv-Relu"),
        ({"encoding_constraints": {}}, "section encoding_constraints"),
    ],
)
def test_what_has_no_equivalent_is_said(write, changes, words):
    with pytest.warns(QuantizationWarning, match=words):
        QuantizationConfig.from_aimet(write(**changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defaults__params__is_symmetric": "False"}, "asymmetric weights"),
        ({"defaults__params__is_quantized": "False"}, "parameters in float"),
        ({"defaults": []}, "no section 'defaults'"),
        ({"defaults__ops__is_symmetric": "yes"}, "must be 'True' or 'False', found 'yes'"),
    ],
)
def test_what_cannot_be_done_is_an_error(write, changes, words):
    with pytest.raises(ConfigurationError, match=words):
        QuantizationConfig.from_aimet(write(**changes))


def test_no_such_file_and_no_json(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        QuantizationConfig.from_aimet(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        QuantizationConfig.from_aimet(tmp_path / "broken.json")
