"""How ids and numbers become fields: Batch -> (B, F, D). One file per idea."""
