"""What a draft may start from: nearly free adaptations without a gradient."""
