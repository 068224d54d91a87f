"""Use a trained model: save it, load it, score raw rows."""
