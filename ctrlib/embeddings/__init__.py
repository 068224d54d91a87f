"""How ids, numbers and histories become vectors: Batch -> (B, F, D). One file per idea."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.parts(__name__)
