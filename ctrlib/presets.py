"""Published models, assembled from parts: what the command line and the recipes mean by a name.

Each function reads like the paper's figure: fields from `Inputs`, a tower, a head. Build your own the same way; nothing
here is special.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from ctrlib.embeddings.combine import ConcatFields
from ctrlib.heads.aitm import AITM
from ctrlib.heads.ensemble import EnsembleHead
from ctrlib.heads.esmm import ESMM
from ctrlib.heads.mmoe import MMoE
from ctrlib.heads.ple import PLE
from ctrlib.heads.shared_bottom import SharedBottom
from ctrlib.heads.stacked import TaskTowers
from ctrlib.heads.stem import STEM
from ctrlib.inputs import Inputs
from ctrlib.model import Model
from ctrlib.schema import NUM_RESERVED_IDS, Numeric, RawId, Schema
from ctrlib.structure import restructure
from ctrlib.towers.apem import APEM
from ctrlib.towers.autoint import AutoInt
from ctrlib.towers.cin import CIN
from ctrlib.towers.combine import Parallel, Stack
from ctrlib.towers.crossnet import CrossNet, CrossNetMix, CrossNetV2
from ctrlib.towers.dlrm import DotInteraction
from ctrlib.towers.dtrn import TaskRefinement
from ctrlib.towers.eulernet import EulerNet
from ctrlib.towers.fgcnn import FGCNN
from ctrlib.towers.fibinet import Bilinear, FiBiNET
from ctrlib.towers.finalmlp import FinalMLP
from ctrlib.towers.finalnet import FinalBlock
from ctrlib.towers.fm import FM
from ctrlib.towers.gdcn import GatedCrossNet
from ctrlib.towers.ipnn import IPNN
from ctrlib.towers.masknet import ParallelMaskNet, SerialMaskNet
from ctrlib.towers.mlp import MLP
from ctrlib.towers.streams import Flatten, Streams

Widths = Sequence[int]


def fm(inputs: Inputs) -> Model:
    """Factorization machine (Rendle, ICDM 2010): bias + first order + pairwise inner products."""
    embedding = inputs.embedding()
    return inputs.model(embedding, FM(embedding.out_shape), unweighted=1, wide=True)


def mlp(inputs: Inputs, *, hidden: Widths = (400, 400, 400), batch_norm: bool = False, dropout: float = 0.0) -> Model:
    """Multi-layer perceptron on the concatenated embeddings (BARS calls it DNN)."""
    embedding = inputs.embedding()
    tower = MLP(embedding.out_shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout)
    return inputs.model(embedding, tower)


def wide_deep(
    inputs: Inputs, *, hidden: Widths = (400, 400, 400), batch_norm: bool = False, dropout: float = 0.0
) -> Model:
    """Wide & Deep (Cheng et al., DLRS 2016, https://arxiv.org/abs/1606.07792) MLP and first order.

    The paper's hand-made crosses are features: add them to the data.
    """
    embedding = inputs.embedding()
    tower = MLP(embedding.out_shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout)
    return inputs.model(embedding, tower, wide=True)


def deepfm(
    inputs: Inputs, *, hidden: Widths = (400, 400, 400), batch_norm: bool = False, dropout: float = 0.0
) -> Model:
    """DeepFM (Guo et al., IJCAI 2017): factorization machine and MLP over the same embeddings, logits added."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    # FM last: its gradient, the first of the two to exist, then takes the MLP's in place.
    tower = Parallel(MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout), FM(shape))
    return inputs.model(embedding, tower, unweighted=1, wide=True)


def xdeepfm(
    inputs: Inputs,
    *,
    num_maps: Widths = (64, 64, 64),
    hidden: Widths = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """xDeepFM (Lian et al., KDD 2018): compressed interaction network, MLP and first order, logits added."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = Parallel(
        MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout),
        CIN(shape, num_maps=num_maps),
    )
    return inputs.model(embedding, tower, wide=True)


def dcnv2(
    inputs: Inputs,
    *,
    num_cross_layers: int = 3,
    hidden: Widths = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """DCN V2, parallel and full rank (Wang et al., WWW 2021)."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = Parallel(
        CrossNetV2(shape, num_layers=num_cross_layers),
        MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout),
    )
    return inputs.model(embedding, tower)


def dcn(
    inputs: Inputs,
    *,
    num_cross_layers: int = 3,
    hidden: Widths = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """Deep & Cross Network (Wang et al., ADKDD 2017): rank-one cross layers beside an MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = Parallel(
        CrossNet(shape, num_layers=num_cross_layers),
        MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout),
    )
    return inputs.model(embedding, tower)


def dcnv2_mix(
    inputs: Inputs,
    *,
    num_cross_layers: int = 3,
    num_experts: int = 4,
    rank: int = 32,
    hidden: Widths = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """DCN-Mix (Wang et al., WWW 2021): cross layers as a gated mixture of low-rank ones, beside an MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = Parallel(
        CrossNetMix(shape, num_layers=num_cross_layers, num_experts=num_experts, rank=rank),
        MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout),
    )
    return inputs.model(embedding, tower)


def gdcn(
    inputs: Inputs,
    *,
    num_cross_layers: int = 3,
    hidden: Widths = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """GDCN-P (Wang et al., CIKM 2023): gated cross layers beside an MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = Parallel(
        GatedCrossNet(shape, num_layers=num_cross_layers),
        MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout),
    )
    return inputs.model(embedding, tower)


def dlrm(inputs: Inputs, *, hidden: Widths = (400, 400, 400), batch_norm: bool = False, dropout: float = 0.0) -> Model:
    """DLRM (Naumov et al., 2019): inner products of all pairs of fields, then an MLP; numeric fields pass beside them.

    The paper's bottom MLP makes one field of all numbers; here each number is a field.
    """
    embedding = inputs.embedding()
    schema = inputs.schema
    dots = DotInteraction(embedding.out_shape, dense_fields=[schema.position(feature.name) for feature in schema.dense])
    tower = Stack(dots, MLP(dots.out_shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout))
    return inputs.model(embedding, tower)


def masknet(
    inputs: Inputs,
    *,
    num_blocks: int = 3,
    block_dim: int = 64,
    reduction_ratio: float = 2.0,
    embedding_norm: bool = True,
    hidden: Widths = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """MaskNet, parallel (Wang et al., DLP-KDD 2021): instance-guided mask blocks over the fields, then an MLP."""
    embedding = inputs.embedding()
    blocks = ParallelMaskNet(
        embedding.out_shape,
        num_blocks=num_blocks,
        block_dim=block_dim,
        reduction_ratio=reduction_ratio,
        embedding_norm=embedding_norm,
        dropout=dropout,
    )
    tower = Stack(blocks, MLP(blocks.out_shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout))
    return inputs.model(embedding, tower)


def masknet_serial(
    inputs: Inputs,
    *,
    reduction_ratio: float = 2.0,
    embedding_norm: bool = True,
    hidden: Widths = (400, 400, 400),
    dropout: float = 0.0,
) -> Model:
    """MaskNet, serial (Wang et al., DLP-KDD 2021): a chain of instance-guided mask blocks."""
    embedding = inputs.embedding()
    tower = SerialMaskNet(
        embedding.out_shape,
        hidden=hidden,
        reduction_ratio=reduction_ratio,
        embedding_norm=embedding_norm,
        dropout=dropout,
    )
    return inputs.model(embedding, tower)


def dualmlp(
    inputs: Inputs,
    *,
    hidden_1: Widths = (400, 400, 400),
    hidden_2: Widths = (400, 400, 400),
    batch_norm_1: bool = False,
    batch_norm_2: bool = False,
    dropout_1: float = 0.0,
    dropout_2: float = 0.0,
) -> Model:
    """DualMLP (Mao et al., AAAI 2023): two MLPs over the same embeddings, logits added; FinalMLP's own baseline."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = Parallel(
        MLP(shape, hidden=hidden_1, batch_norm=batch_norm_1, dropout=dropout_1),
        MLP(shape, hidden=hidden_2, batch_norm=batch_norm_2, dropout=dropout_2),
    )
    return inputs.model(embedding, tower)


def finalmlp(
    inputs: Inputs,
    *,
    hidden_1: Widths = (400, 400, 400),
    hidden_2: Widths = (400, 400, 400),
    batch_norm_1: bool = False,
    batch_norm_2: bool = False,
    dropout_1: float = 0.0,
    dropout_2: float = 0.0,
    num_heads: int = 1,
    contexts: tuple[Sequence[str], Sequence[str]] | None = ((), ()),
    gate_hidden: Widths = (800,),
    zero_context: bool = False,
) -> Model:
    """FinalMLP (Mao et al., AAAI 2023): two gated MLP streams and their bilinear fusion.

    `contexts` names the features that drive each stream's gate, looked up in tables of their own.
    """
    embedding = inputs.embedding()
    num_fields = embedding.out_shape[0]
    positions: tuple[range, range] | None = None
    if contexts is not None:
        if len(contexts) != 2 or any(isinstance(names, str) or len({*names}) < len(names) for names in contexts):
            raise ValueError(
                f"contexts must be two lists of distinct feature names, one for each stream's gate, got {contexts}"
            )
        behind = num_fields
        parts = [embedding]
        ranges = []
        for stream, names in enumerate(contexts):
            if names:
                parts.append(inputs.embedding(names, suffix=f"_context{stream + 1}"))
            ranges.append(range(behind, behind + len(names)))
            behind += len(names)
        positions = (ranges[0], ranges[1])
        embedding = ConcatFields(*parts) if len(parts) > 1 else embedding
    tower = FinalMLP(
        embedding.out_shape,
        num_fields=num_fields,
        hidden_1=hidden_1,
        hidden_2=hidden_2,
        batch_norm_1=batch_norm_1,
        batch_norm_2=batch_norm_2,
        dropout_1=dropout_1,
        dropout_2=dropout_2,
        num_heads=num_heads,
        contexts=positions,
        gate_hidden=gate_hidden,
        zero_context=zero_context,
    )
    return inputs.model(embedding, tower, unweighted=1)


def finalnet(
    inputs: Inputs,
    *,
    hidden_1: Widths = (400, 400),
    hidden_2: Widths | None = (400,),
    field_gate: bool = True,
    batch_norm: bool = True,
    dropout_1: float = 0.0,
    dropout_2: float = 0.0,
    distill: bool = True,
) -> Model:
    """FinalNet (Zhu et al., SIGIR 2023): factorized interaction layers in two blocks that also learn from their mean.

    `hidden_2=None` is the one-block model. The first block reads a gated copy of the fields too (`field_gate`).
    """
    embedding = inputs.embedding()
    shape = embedding.out_shape
    block = FinalBlock(shape, hidden=hidden_1, field_gate=field_gate, batch_norm=batch_norm, dropout=dropout_1)
    if hidden_2 is None:
        return inputs.model(embedding, block)
    tower = Parallel(block, FinalBlock(shape, hidden=hidden_2, batch_norm=batch_norm, dropout=dropout_2))
    head = EnsembleHead(
        tower.out_shape,
        widths=(hidden_1[-1], hidden_2[-1]),
        num_tasks=len(inputs.schema.labels),
        distill=distill,
    )
    return inputs.model(embedding, tower, head=head)


def autoint(
    inputs: Inputs,
    *,
    num_layers: int = 3,
    num_heads: int = 2,
    head_dim: int = 32,
    scale: bool = False,
    identity: bool = False,
    norm_before_relu: bool = False,
    attention_dropout: float = 0.0,
    wide: bool = False,
) -> Model:
    """AutoInt (Song et al., CIKM 2019): self-attention over the fields. Some rows of BARS add a first-order term."""
    embedding = inputs.embedding()
    tower = AutoInt(
        embedding.out_shape,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        scale=scale,
        identity=identity,
        norm_before_relu=norm_before_relu,
        dropout=attention_dropout,
    )
    return inputs.model(embedding, tower, wide=wide)


def autoint_plus(
    inputs: Inputs,
    *,
    num_layers: int = 3,
    num_heads: int = 2,
    head_dim: int = 32,
    scale: bool = False,
    identity: bool = False,
    norm_before_relu: bool = False,
    attention_dropout: float = 0.0,
    wide: bool = False,
    hidden: Widths = (400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """AutoInt+ (Song et al., CIKM 2019): AutoInt beside an MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    attention = AutoInt(
        shape,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        scale=scale,
        identity=identity,
        norm_before_relu=norm_before_relu,
        dropout=attention_dropout,
    )
    tower = Parallel(attention, MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout))
    return inputs.model(embedding, tower, wide=wide)


def ipnn(inputs: Inputs, *, hidden: Widths = (400, 400, 400), batch_norm: bool = False, dropout: float = 0.0) -> Model:
    """IPNN (Qu et al., ICDM 2016): inner products of all pairs beside the fields, then an MLP."""
    embedding = inputs.embedding()
    products = IPNN(embedding.out_shape)
    tower = Stack(products, MLP(products.out_shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout))
    return inputs.model(embedding, tower)


def fgcnn(
    inputs: Inputs,
    *,
    num_channels: Widths = (14, 16, 18, 20),
    kernel_height: int = 7,
    pooling_size: int = 2,
    num_new: int = 3,
    share_embedding: bool = False,
    hidden: Widths = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """FGCNN (Liu et al., WWW 2019): a convolution over the fields makes new fields, IPNN reads both.

    The convolution has tables of its own, unless `share_embedding`.
    """
    embedding = inputs.embedding()
    num_raw = None
    if not share_embedding:
        num_raw = embedding.out_shape[0]
        embedding = ConcatFields(embedding, inputs.embedding(suffix="_convolution"))
    generator = FGCNN(
        embedding.out_shape,
        num_raw=num_raw,
        num_channels=num_channels,
        kernel_height=kernel_height,
        pooling_size=pooling_size,
        num_new=num_new,
    )
    products = IPNN(generator.out_shape)
    mlp_tower = MLP(products.out_shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout)
    return inputs.model(embedding, Stack(generator, products, mlp_tower))


def fibinet(
    inputs: Inputs,
    *,
    bilinear: Bilinear = "field_interaction",
    reduction_ratio: float = 3,
    share_bilinear: bool = False,
    hidden: Widths = (400, 400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> Model:
    """FiBiNET (Huang et al., RecSys 2019): bilinear products of raw and of reweighted fields, an MLP, first order."""
    embedding = inputs.embedding()
    products = FiBiNET(
        embedding.out_shape, bilinear=bilinear, reduction_ratio=reduction_ratio, share_bilinear=share_bilinear
    )
    tower = Stack(products, MLP(products.out_shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout))
    return inputs.model(embedding, tower, wide=True)


def eulernet(
    inputs: Inputs,
    *,
    num_orders: Widths = (52,),
    layer_norm: bool = False,
    explicit_dropout: float = 0.0,
    implicit_dropout: float = 0.0,
) -> Model:
    """EulerNet (Tian et al., SIGIR 2023): products of fields with learned exponents, in complex space."""
    embedding = inputs.embedding()
    tower = EulerNet(
        embedding.out_shape,
        num_orders=num_orders,
        layer_norm=layer_norm,
        explicit_dropout=explicit_dropout,
        implicit_dropout=implicit_dropout,
    )
    return inputs.model(embedding, tower)


def shared_bottom(
    inputs: Inputs, *, bottom_hidden: Widths = (128, 64), tower_hidden: Widths = (32,), dropout: float = 0.0
) -> Model:
    """Shared bottom (Caruana, 1997): one hidden network for all labels, then one for each."""
    embedding = inputs.embedding()
    tower = Flatten(embedding.out_shape)
    head = SharedBottom(
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
    expert_hidden: Widths = (128, 64),
    tower_hidden: Widths = (32,),
    dropout: float = 0.0,
    one_gate: bool = False,
    refine: bool = False,
) -> Model:
    """MMoE (Ma et al., KDD 2018): experts for all labels, weighted by each label's gate; OMoE with `one_gate`.

    `refine`: fields refined for each label first (`TaskRefinement`), half of `dtrn`.
    """
    embedding = inputs.embedding(of_each_label=refine)
    num_tasks = len(inputs.schema.labels)
    shape = embedding.out_shape
    tower = TaskRefinement(shape, num_tasks=num_tasks) if refine else Flatten(shape)
    head = MMoE(
        tower.out_shape,
        num_tasks=num_tasks,
        num_experts=num_experts,
        expert_hidden=expert_hidden,
        tower_hidden=tower_hidden,
        dropout=dropout,
        one_gate=one_gate,
    )
    return inputs.model(embedding, tower, head=head)


def ple(
    inputs: Inputs,
    *,
    num_levels: int = 2,
    num_own: int = 2,
    num_shared: int = 2,
    expert_hidden: Widths = (128, 64),
    tower_hidden: Widths = (32,),
    dropout: float = 0.0,
    refine: bool = False,
) -> Model:
    """PLE (Tang et al., RecSys 2020): each label's own experts beside shared ones, in levels; CGC is one level.

    `refine`: as in `mmoe`; shared experts read the fields unrefined.
    """
    embedding = inputs.embedding(of_each_label=refine)
    num_tasks = len(inputs.schema.labels)
    shape = embedding.out_shape
    tower = TaskRefinement(shape, num_tasks=num_tasks, shared_stream=True) if refine else Flatten(shape)
    head = PLE(
        tower.out_shape,
        num_tasks=num_tasks,
        num_levels=num_levels,
        num_own=num_own,
        num_shared=num_shared,
        expert_hidden=expert_hidden,
        tower_hidden=tower_hidden,
        dropout=dropout,
    )
    return inputs.model(embedding, tower, head=head)


def esmm(inputs: Inputs, *, tower_hidden: Widths = (128, 64), dropout: float = 0.0) -> Model:
    """ESMM (Ma et al., SIGIR 2018): labels are steps of a chain, each only after the one before (click, conversion)."""
    embedding = inputs.embedding()
    tower = Flatten(embedding.out_shape)
    num_tasks = len(inputs.schema.labels)
    head = ESMM(tower.out_shape, num_tasks=num_tasks, hidden=tower_hidden, dropout=dropout)
    return inputs.model(embedding, tower, head=head)


def aitm(inputs: Inputs, *, tower_hidden: Widths = (128, 64, 32), dropout: float = 0.0, penalty: float = 0.6) -> Model:
    """AITM (Xi et al., KDD 2021): each label's network hands on to the next.

    Labels are in the order of their steps, each only after the one before; set `penalty` to 0 where that is not so.
    """
    embedding = inputs.embedding()
    tower = Flatten(embedding.out_shape)
    num_tasks = len(inputs.schema.labels)
    head = AITM(tower.out_shape, num_tasks=num_tasks, tower_hidden=tower_hidden, dropout=dropout, penalty=penalty)
    return inputs.model(embedding, tower, head=head)


def stem(
    inputs: Inputs,
    *,
    num_experts: int = 1,
    expert_hidden: Widths = (128, 64),
    tower_hidden: Widths = (32,),
    dropout: float = 0.0,
) -> Model:
    """STEM (Su et al., AAAI 2024): embeddings and experts of each label's own beside shared ones, read by all labels.

    `embedding_dim` is the width of one label's fields: the tables are T + 1 times as wide.
    """
    num_tasks = len(inputs.schema.labels)
    embedding = replace(inputs, embedding_dim=(num_tasks + 1) * inputs.embedding_dim).embedding()
    tower = Streams(embedding.out_shape, num_streams=num_tasks + 1)
    head = STEM(
        tower.out_shape,
        num_tasks=num_tasks,
        num_experts=num_experts,
        expert_hidden=expert_hidden,
        tower_hidden=tower_hidden,
        dropout=dropout,
    )
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
    """In the style of APEM (Tao et al., 2023): set attention over the fields, patterns selected for each label.

    Labels are steps of a chain, each only after the one before (as in `esmm`), or independent without `chain`.
    """
    embedding = inputs.embedding()
    num_tasks = len(inputs.schema.labels)
    tower = APEM(
        embedding.out_shape, num_tasks=num_tasks, num_groups=num_groups, num_blocks=num_blocks, num_heads=num_heads
    )
    head = (ESMM if chain else TaskTowers)(tower.out_shape, num_tasks=num_tasks, hidden=tower_hidden, dropout=dropout)
    return inputs.model(embedding, tower, head=head)


def dtrn(
    inputs: Inputs,
    *,
    num_experts: int = 8,
    expert_hidden: Widths = (128, 64),
    tower_hidden: Widths = (32,),
    dropout: float = 0.0,
) -> Model:
    """In the style of DTRN (Liu et al., CIKM 2023): histories read and fields refined for each label, before MMoE.

    With one expert, before a shared bottom; before PLE: `ple` with `refine`, and "tim" for its inputs' `sequence`.
    """
    if inputs.sequence not in ("pooled", "tim"):
        raise ValueError(
            f"dtrn reads histories in its own way, 'tim', got sequence={inputs.sequence!r}: leave it out, or use mmoe "
            "with refine=True"
        )
    return mmoe(
        replace(inputs, sequence="tim"),
        num_experts=num_experts,
        expert_hidden=expert_hidden,
        tower_hidden=tower_hidden,
        dropout=dropout,
        refine=True,
    )


# The names of the command line, in snake case.
PRESETS: dict[str, Callable[..., Model]] = {
    preset.__name__: preset
    for preset in (
        *(mlp, fm, wide_deep, deepfm, xdeepfm, dcn, dcnv2, dcnv2_mix, gdcn, dlrm, autoint, autoint_plus, ipnn),
        *(fgcnn, fibinet, masknet, masknet_serial, dualmlp, finalmlp, finalnet, eulernet),
        *(shared_bottom, mmoe, ple, esmm, aitm, stem, apem, dtrn),
    )
}
_OF_INPUTS = tuple(field.name for field in fields(Inputs) if field.name != "schema")


def arguments_of(preset: str) -> list[str]:
    """What a preset takes besides `Inputs`.

    >>> arguments_of("dcnv2")
    ['num_cross_layers', 'hidden', 'batch_norm', 'dropout']
    """
    return list(inspect.signature(PRESETS[preset]).parameters)[1:]


def for_engine(config: dict[str, Any], engine: str) -> dict[str, Any]:
    """The config with what an engine's kernels want: in the fused engine four stacks of tables, multiples of 4 wide.

    >>> for_engine({"preset": "deepfm"}, "fused"), for_engine({"preset": "deepfm"}, "exact")
    ({'preset': 'deepfm', 'stacked': 4, 'wide_columns': 4}, {'preset': 'deepfm'})
    """
    return {**config, "stacked": 4, "wide_columns": 4} if engine == "fused" else config


def build(config: dict[str, Any], schema: Schema) -> Model:
    """The model that a saved `{"preset": name, **arguments}` describes: arguments of `Inputs` and of the preset.

    `replaced` says which parts of a compressed model are not the preset's (`ctrlib.structure`).

    Raises:
        ValueError: there is no preset of that name, or it does not take one of the arguments or its value.
    """
    arguments = dict(config)
    if replaced := arguments.pop("replaced", None):
        # Tables that are to give way need not be made in full first; if some stay, all are made again as they are.
        model = restructure(_build(arguments, _with_few_rows(schema)), replaced)
        if not any(isinstance(part, EmbeddingBagCollection | EmbeddingCollection) for part in model.modules()):
            return model
        return restructure(_build(arguments, schema), replaced)
    return _build(arguments, schema)


def _with_few_rows(schema: Schema) -> Schema:
    """The same features, each with a table of the reserved rows and one more."""
    few = NUM_RESERVED_IDS + 1
    return replace(
        schema,
        features=tuple(
            feature if isinstance(feature, Numeric | RawId) else replace(feature, num_embeddings=few)
            for feature in schema.features
        ),
    )


def _build(config: dict[str, Any], schema: Schema) -> Model:
    arguments = dict(config)
    name = arguments.pop("preset")
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}, expected one of {sorted(PRESETS)}")
    inputs = Inputs(schema, **{key: arguments.pop(key) for key in _OF_INPUTS if key in arguments})
    unknown = sorted(set(arguments) - set(arguments_of(name)))
    if unknown:
        raise ValueError(f"{name} takes no {unknown}: expected some of {[*_OF_INPUTS, *arguments_of(name)]}")
    try:
        return PRESETS[name](inputs, **arguments)
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"{name} does not take these arguments, one is of the wrong kind: {config} ({error})"
        ) from error
