"""The error of this package; launcher/failures.py draws the whole tree."""


class QuantError(ValueError):
    """A quantization scheme that contradicts itself or the model: one sentence for the user."""
