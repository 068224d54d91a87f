"""What is predicted: (B, H) -> (B, T) logits. One file per paper."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.parts(__name__)
