"""The errors of this package; launcher/failures.py draws the whole tree."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or does not fit its config: one sentence for the user."""


class ModelError(ValueError):
    """A model, or a way to split it, that cannot be computed: one sentence for the user."""


class PromptError(ValueError):
    """A prompt that cannot be answered: one sentence for the user."""


class PeerError(RuntimeError):
    """A collective failed because of another rank; never the first cause of a failed run."""


class NumericsError(RuntimeError):
    """Logits that are not numbers: weights that are damaged, or a dtype that cannot hold them."""
