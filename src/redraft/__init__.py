"""redraft realigns the draft model of speculative decoding with a fine-tuned target."""

import os

# The CPU kernels of torch keep compiled code for every matrix shape they have met, up to 1,024 shapes in each of two
# caches; packed batches are all of different shapes, and training grew by gigabytes. Torch reads this at its first
# product.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "128")

__version__ = "0.1.0"
