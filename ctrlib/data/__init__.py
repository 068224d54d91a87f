"""From raw rows to batches: preparation, loader, and synthetic teachers with a known best AUC."""
