"""Texts: prompts and responses of any shape, answers of targets and servers, and the suites that are measured on."""
