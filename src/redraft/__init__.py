"""redraft realigns the draft model of speculative decoding with a fine-tuned target."""

__version__ = "0.1.0"
