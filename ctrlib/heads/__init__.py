"""What is predicted: (B, H) -> (B, T) logits. One file per paper."""
