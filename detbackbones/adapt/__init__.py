"""What makes a model the backbone of a detector: norms, freezing, folding, pruning, less memory."""
