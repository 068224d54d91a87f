"""Published models of several labels: fields from `Inputs`, mostly as they are, and a head with parts of each label's
own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ctrlib import heads, towers
from ctrlib.models.arguments import Experts, Widths

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ctrlib.inputs import Inputs
    from ctrlib.model import Model


def shared_bottom(
    inputs: Inputs, *, bottom_hidden: Widths = (128, 64), tower_hidden: Widths = (32,), dropout: float = 0.0
) -> Model:
    """Shared bottom (Caruana, Machine Learning 1997, https://doi.org/10.1023/A:1007379606734): one hidden network for
    all labels, then one for each."""
    embedding = inputs.embedding()
    tower = towers.Flatten(embedding.out_shape)
    head = heads.SharedBottom(
        tower.out_shape,
        num_tasks=len(inputs.schema.labels),
        bottom_hidden=bottom_hidden,
        tower_hidden=tower_hidden,
        dropout=dropout,
    )
    return inputs.model(embedding, tower, head=head)


def mmoe(
    inputs: Inputs,
    *,
    num_experts: int = 8,
    one_gate: bool = False,
    refine: bool = False,
    **experts: Unpack[Experts],
) -> Model:
    """MMoE (Ma et al., KDD 2018, https://doi.org/10.1145/3219819.3220007): experts for all labels, weighted by each
    label's gate.

    `one_gate`: OMoE, one gate for all labels. `refine`: fields refined for each label first (`TaskRefinement`), half of
    `dtrn`.
    """
    embedding = inputs.embedding(of_each_label=refine)
    num_tasks = len(inputs.schema.labels)
    shape = embedding.out_shape
    tower = towers.TaskRefinement(shape, num_tasks=num_tasks) if refine else towers.Flatten(shape)
    head = heads.MMoE(tower.out_shape, num_tasks=num_tasks, num_experts=num_experts, one_gate=one_gate, **experts)
    return inputs.model(embedding, tower, head=head)


def ple(
    inputs: Inputs,
    *,
    num_levels: int = 2,
    num_own: int = 2,
    num_shared: int = 2,
    refine: bool = False,
    **experts: Unpack[Experts],
) -> Model:
    """PLE (Tang et al., RecSys 2020, https://doi.org/10.1145/3383313.3412236): each label's own experts beside shared
    ones, in levels.

    CGC is one level. `refine`: as in `mmoe`; shared experts read the fields unrefined.
    """
    embedding = inputs.embedding(of_each_label=refine)
    num_tasks = len(inputs.schema.labels)
    shape = embedding.out_shape
    tower = towers.TaskRefinement(shape, num_tasks=num_tasks, shared_stream=True) if refine else towers.Flatten(shape)
    head = heads.PLE(
        tower.out_shape,
        num_tasks=num_tasks,
        num_levels=num_levels,
        num_own=num_own,
        num_shared=num_shared,
        **experts,
    )
    return inputs.model(embedding, tower, head=head)


def esmm(inputs: Inputs, *, tower_hidden: Widths = (128, 64), dropout: float = 0.0) -> Model:
    """ESMM (Ma et al., SIGIR 2018, https://doi.org/10.1145/3209978.3210104): steps of a chain (click, then conversion)
    over all rows, in log space.

    Labels are in the order of their steps, each only after the one before.
    """
    embedding = inputs.embedding()
    tower = towers.Flatten(embedding.out_shape)
    num_tasks = len(inputs.schema.labels)
    head = heads.ESMM(tower.out_shape, num_tasks=num_tasks, hidden=tower_hidden, dropout=dropout)
    return inputs.model(embedding, tower, head=head)


def aitm(inputs: Inputs, *, tower_hidden: Widths = (128, 64, 32), dropout: float = 0.0, penalty: float = 0.6) -> Model:
    """AITM (Xi et al., KDD 2021, https://doi.org/10.1145/3447548.3467071): each label's network hands on to the next,
    with the calibrator.

    Labels are in the order of their steps, each only after the one before; set `penalty` to 0 where that is not so.
    """
    embedding = inputs.embedding()
    tower = towers.Flatten(embedding.out_shape)
    num_tasks = len(inputs.schema.labels)
    head = heads.AITM(tower.out_shape, num_tasks=num_tasks, tower_hidden=tower_hidden, dropout=dropout, penalty=penalty)
    return inputs.model(embedding, tower, head=head)


def stem(inputs: Inputs, *, num_experts: int = 1, **experts: Unpack[Experts]) -> Model:
    """STEM (Su et al., AAAI 2024, https://doi.org/10.1609/aaai.v38i8.28749): embeddings and experts of each label's own
    beside shared ones, read by all labels.

    `embedding_dim` is the width of one label's fields: the tables are T + 1 times as wide.
    """
    num_tasks = len(inputs.schema.labels)
    embedding = replace(inputs, embedding_dim=(num_tasks + 1) * inputs.embedding_dim).embedding()
    tower = towers.Streams(embedding.out_shape, num_streams=num_tasks + 1)
    head = heads.STEM(tower.out_shape, num_tasks=num_tasks, num_experts=num_experts, **experts)
    return inputs.model(embedding, tower, head=head)


def apem(
    inputs: Inputs,
    *,
    num_groups: int = 8,
    num_blocks: int = 1,
    num_heads: int = 2,
    tower_hidden: Widths = (64, 32),
    dropout: float = 0.0,
    chain: bool = True,
) -> Model:
    """APEM, in its style (Tao et al., 2023, https://arxiv.org/abs/2301.02494): set attention over the fields, patterns
    selected for each label.

    Labels are steps of a chain, each only after the one before (as in `esmm`), or independent without `chain`.
    """
    embedding = inputs.embedding()
    num_tasks = len(inputs.schema.labels)
    tower = towers.APEM(
        embedding.out_shape, num_tasks=num_tasks, num_groups=num_groups, num_blocks=num_blocks, num_heads=num_heads
    )
    make_head = heads.ESMM if chain else heads.TaskTowers
    head = make_head(tower.out_shape, num_tasks=num_tasks, hidden=tower_hidden, dropout=dropout)
    return inputs.model(embedding, tower, head=head)


def dtrn(inputs: Inputs, *, num_experts: int = 8, **experts: Unpack[Experts]) -> Model:
    """DTRN, in its style (Liu et al., CIKM 2023, https://arxiv.org/abs/2308.05996): histories read and fields refined
    for each label, before MMoE.

    With one expert, before a shared bottom; before PLE: `ple` with `refine`, and "tim" for its inputs' `sequence`.
    """
    return mmoe(inputs.reading("tim"), num_experts=num_experts, refine=True, **experts)
