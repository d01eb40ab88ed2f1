"""Measurement: acceptance, speed, servers and their statistics. Reads drafts and targets, trains nothing."""
