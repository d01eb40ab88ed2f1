"""Acceptance without decoding: rounds walked over stored responses of the target."""
