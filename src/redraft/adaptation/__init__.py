"""Whole jobs: adapt, probe, quickstart. Each is made of stages that can be stopped and resumed."""
