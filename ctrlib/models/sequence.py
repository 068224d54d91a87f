"""Published models of what a user did before: each reads histories in its own way, before an MLP.

The same ways go with any other model, as `sequence` of its `Inputs` (`ctrlib train --sequence din`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ctrlib.models.arguments import Regularisation, Widths
from ctrlib.models.interaction import mlp

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ctrlib.inputs import Inputs
    from ctrlib.model import Model


def din(inputs: Inputs, *, softmax: bool = False, hidden: Widths = (200, 80), **rest: Unpack[Regularisation]) -> Model:
    """DIN (Zhou et al., KDD 2018, https://arxiv.org/abs/1706.06978): events weighed by how near they are to the target,
    then an MLP.

    `softmax`: weights that sum to one; the paper's are raw.
    """
    return mlp(inputs.reading("din_softmax" if softmax else "din"), hidden=hidden, **rest)


def bst(inputs: Inputs, *, hidden: Widths = (1024, 512, 256), **rest: Unpack[Regularisation]) -> Model:
    """BST (Chen et al., DLP-KDD 2019, https://arxiv.org/abs/1905.06874): a transformer layer over events and target,
    then an MLP."""
    return mlp(inputs.reading("bst"), hidden=hidden, **rest)


def sim(inputs: Inputs, *, hidden: Widths = (200, 80), **rest: Unpack[Regularisation]) -> Model:
    """SIM (Pi et al., CIKM 2020, https://arxiv.org/abs/2006.05639): attention over the events of a long history that
    are nearest to the target, then an MLP."""
    return mlp(inputs.reading("sim"), hidden=hidden, **rest)
