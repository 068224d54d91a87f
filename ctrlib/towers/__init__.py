"""How fields interact: (B, F, D) -> (B, H). One file per paper."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.parts(__name__)
