"""File formats of drafts: what is read and what is written, as far as families share it."""
