"""Loss on held-out text during training (``eval`` of a run): sources, evaluation, and the best of a run."""
