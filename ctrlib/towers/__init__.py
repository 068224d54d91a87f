"""How fields interact: (B, F, D) -> (B, H). One file per paper."""
