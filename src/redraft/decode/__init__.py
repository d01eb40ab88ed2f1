"""Lossless speculative decoding: the verification rule and the engines around it."""
