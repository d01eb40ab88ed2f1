"""What the EAGLE families share: one decoder layer over the target's states, fed its own states from step to step."""
