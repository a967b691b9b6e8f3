"""Every error of this package: each names the layer, what was found there, and what to do about it."""


class QuantizationError(Exception):
    """Base of all errors raised by ``lightning_qbn``."""


class ConfigurationError(QuantizationError, ValueError):
    """A setting is out of range, has the wrong type, or names nothing in the network."""


class UnsupportedNetworkError(QuantizationError):
    """The network has nothing to quantize, or cannot be quantized as it stands."""


class CalibrationError(QuantizationError):
    """The quantizer ranges could not be initialised; the network is as it was before."""


class ReestimationError(QuantizationError):
    """Batch-norm statistics could not be re-estimated; the old ones are back."""


class FoldingError(QuantizationError):
    """The network cannot be folded; it has not been touched."""


class ExportError(QuantizationError):
    """The network cannot be exported; no file has been written."""


class DataError(QuantizationError):
    """A data set cannot be found, or a batch has a form that is not understood."""


class QuantizationWarning(UserWarning):
    """Something a user should know: the run goes on, and its result is right."""
