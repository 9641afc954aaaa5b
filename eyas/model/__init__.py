"""What computes: transformer blocks, their cache and masks, the target, the draft's vocabulary, and how weights come in."""
