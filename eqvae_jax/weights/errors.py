"""The one exception of this package."""


class WeightsError(ValueError):
    """Weights cannot be read, written, or do not fit; the message says which, where, and what to do."""
