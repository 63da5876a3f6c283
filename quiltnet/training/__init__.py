"""The contrastive training loop: one loss, one step, one state that holds everything that moves."""
