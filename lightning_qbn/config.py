"""How a network is quantized: one frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lightning_qbn.aimet_config import settings_of
from lightning_qbn.arguments import is_whole
from lightning_qbn.errors import ConfigurationError

_CHOICES = {
    "weight_granularity": ("per_channel", "per_tensor"),
    "scale": ("learned", "pact", "observed"),
    "range_estimator": ("mse", "minmax", "percentile"),
}
_NOT_PER_LAYER = ("overrides", "skip")


@dataclass(frozen=True)
class QuantizationConfig:
    """Bit-widths, granularity and range setting of every quantizer in a network.

    Weights are always symmetric on the narrow range ``[-(2**(b-1)-1), 2**(b-1)-1]``, so that folding a
    batch-norm with a negative gamma is an exact change of sign.

    Args:
        weight_bits: 2 to 8.
        activation_bits: 2 to 16, or None to leave activations in float.
        weight_granularity: one scale per output channel, or one per weight tensor.
        activation_symmetric: signed activations with zero point 0 instead of affine unsigned ones.
        scale: ``"learned"`` trains the scale by gradient descent (LSQ, Esser et al., ICLR 2020, section 2,
            on the logarithm of the scale as in TQT, Jain et al., MLSys 2020, section 3);
            ``"pact"`` also trains it, but moves those of activations by the values that are clipped alone (Choi et
            al., 2018, equation 3); ``"observed"`` follows a moving minimum and maximum.
        range_estimator: how calibration chooses the first scale.
        learned_zero_point: also train the zero point of affine activations (LSQ+, Bhalgat et al., CVPR workshops
            2020, section 3), which stays a whole number. Of those behind a ReLU it stays 0.
        gradient_scale: divide the gradient of a learned scale by ``sqrt(values * quant_max)``, with the number of
            values that the scale serves (LSQ, section 2.2). It makes the learning rate of scales comparable to that
            of weights for SGD; Adam is indifferent to it.
        overrides: settings for single layers by module name pattern, such as
            ``{"head": {"weight_bits": 8}}``. A pattern matches a layer by its own name or by the name of
            a module that contains it, written from the module that quantizers are inserted into or from the
            traced network in it (``net.head`` or ``head``). Later entries win.
        skip: patterns of layers that stay in float.

    Raises:
        ConfigurationError: a value is out of range or of the wrong type.

    >>> QuantizationConfig(weight_bits=4, overrides={"head": {"weight_bits": 8}}).for_layer("head").weight_bits
    8
    """

    weight_bits: int = 8
    activation_bits: int | None = 8
    weight_granularity: str = "per_channel"
    activation_symmetric: bool = False
    scale: str = "learned"
    range_estimator: str = "mse"
    learned_zero_point: bool = False
    gradient_scale: bool = False
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    skip: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check every field and turn containers from YAML into plain ones."""
        _check_bits("weight_bits", self.weight_bits, 2, 8)
        if self.activation_bits is not None:
            _check_bits("activation_bits", self.activation_bits, 2, 16)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigurationError(f"{name} must be one of {choices}, found {getattr(self, name)!r}.")
        self._check_flags()
        listed = isinstance(self.skip, Sequence) and not isinstance(self.skip, str)
        if not listed or not all(isinstance(pattern, str) for pattern in self.skip):
            raise ConfigurationError(f"skip must be a list of name patterns, found {self.skip!r}.")
        if not isinstance(self.overrides, Mapping):
            raise ConfigurationError(f"overrides must map name patterns to settings, found {self.overrides!r}.")
        for pattern, settings in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(settings, Mapping):
                raise ConfigurationError(
                    f"overrides must map name patterns to settings, found {pattern!r}: {settings!r}. "
                    f"Expected something like {{'head': {{'weight_bits': 8}}}}."
                )
        object.__setattr__(self, "skip", tuple(self.skip))
        object.__setattr__(self, "overrides", {p: dict(s) for p, s in self.overrides.items()})
        for pattern, settings in self.overrides.items():
            self._with(pattern, settings)

    def _check_flags(self) -> None:
        for name in ("activation_symmetric", "learned_zero_point", "gradient_scale"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigurationError(f"{name} must be a bool, found {getattr(self, name)!r}.")
        for name in ("learned_zero_point", "gradient_scale"):
            if getattr(self, name) and self.scale == "observed":
                raise ConfigurationError(f"{name} is for scales that are learned, but scale is 'observed'.")
        if self.learned_zero_point and self.activation_symmetric:
            raise ConfigurationError("learned_zero_point needs affine activations, but activation_symmetric is True.")

    @classmethod
    def from_aimet(cls, path: str | Path, **settings: Any) -> QuantizationConfig:
        """The config that a quantsim configuration file of AIMET describes.

        Granularity of weights, symmetry of activations and whether they are quantized come from the file. Bits are no
        part of it. Bias becomes int32 when it is exported, whatever the file says.

        Args:
            path: JSON file, such as ``default_config_per_channel.json``.
            **settings: fields of the config, such as ``weight_bits=4``; they come before those of the file.

        Raises:
            ConfigurationError: the file cannot be read, or asks for what cannot be done.
        """
        return cls(**(settings_of(path) | settings))

    def _with(self, pattern: str, settings: Mapping[str, Any]) -> QuantizationConfig:
        """This config with the settings of one override."""
        allowed = [f.name for f in dataclasses.fields(self) if f.name not in _NOT_PER_LAYER]
        for name in settings:
            if name not in allowed:
                raise ConfigurationError(
                    f"overrides[{pattern!r}] sets {name!r}, which is no setting of a layer. Settings: {allowed}."
                )
        try:
            return dataclasses.replace(self, overrides={}, skip=(), **settings)
        except ConfigurationError as error:
            raise ConfigurationError(f"overrides[{pattern!r}]: {error}") from error

    def for_layer(self, *names: str) -> QuantizationConfig:
        """The settings of one layer, with all overrides that match one of its names applied in order."""
        config = self._with("", {})
        for pattern, settings in self.overrides.items():
            if any(matches(pattern, name) for name in names):
                config = config._with(pattern, settings)
        return config

    def skips(self, *names: str) -> bool:
        """Whether the layer of these names stays in float."""
        return any(matches(pattern, name) for pattern in self.skip for name in names)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise when a pattern of ``overrides`` or ``skip`` matches no layer.

        Args:
            names: module names of all layers that could be quantized.

        Raises:
            ConfigurationError: names the pattern and the layers nearest to it.
        """
        names = list(names)
        for where, patterns in (("overrides", self.overrides), ("skip", self.skip)):
            for pattern in patterns:
                if not any(matches(pattern, name) for name in names):
                    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
                    raise ConfigurationError(
                        f"{where} has the pattern {pattern!r}, which matches no layer of the network. "
                        f"Nearest names: {', '.join(near) or 'none'}."
                    )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON and for checkpoints that load with ``weights_only=True``."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_PER_LAYER} | {
            "overrides": {p: dict(s) for p, s in self.overrides.items()},
            "skip": list(self.skip),
        }


def matches(pattern: str, name: str) -> bool:
    """Whether a glob pattern names a module or one of the modules that contain it.

    >>> matches("head", "head.fc"), matches("*.stem.*", "stem.conv"), matches("head", "overhead")
    (True, True, False)
    """
    pattern, parts = uncompiled_name(pattern), uncompiled_name(name).split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    # A pattern such as "*.stem.*" is meant to find "stem.conv" also where the stem is at the top.
    return any(fnmatchcase(path, pattern) or fnmatchcase("." + path, pattern) for path in paths)


def uncompiled_name(name: str) -> str:
    """The name of a module without the parts that ``torch.compile`` adds, which a copy of it does not have.

    >>> uncompiled_name("net._orig_mod.0")
    'net.0'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _check_bits(name: str, bits: object, low: int, high: int) -> None:
    if not is_whole(bits, low, high):
        raise ConfigurationError(f"{name} must be a whole number from {low} to {high}, found {bits!r}.")


def as_config(config: QuantizationConfig | Mapping[str, Any] | None) -> QuantizationConfig:
    """A config from itself, from a mapping of its fields, or the default one."""
    if isinstance(config, QuantizationConfig):
        return config
    if config is not None and not isinstance(config, Mapping):
        raise ConfigurationError(f"config must be a QuantizationConfig or a mapping of its fields, found {config!r}.")
    known = {f.name for f in dataclasses.fields(QuantizationConfig)}
    for name in config or {}:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ConfigurationError(f"QuantizationConfig has no field {name!r}. Nearest: {', '.join(near) or 'none'}.")
    return QuantizationConfig(**(config or {}))
