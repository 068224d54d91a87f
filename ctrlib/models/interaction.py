"""Published models of how fields interact: fields from `Inputs`, a tower, a head.

Each function reads like the paper's figure. Build your own the same way; nothing here is special. Its docstring begins
with title, paper and what it computes: the table of models (`ctrlib.models.MODELS`) is made from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ctrlib import embeddings, heads, towers
from ctrlib.errors import ArgumentError
from ctrlib.models.arguments import Attention, Deep, Widths

if TYPE_CHECKING:  # the command line reads names and arguments here, and nobody waits for torch to see a list
    from typing_extensions import Unpack

    from ctrlib.inputs import Inputs
    from ctrlib.model import Model
    from ctrlib.towers.fibinet import Bilinear


def mlp(inputs: Inputs, **mlp: Unpack[Deep]) -> Model:
    """MLP (Covington et al., RecSys 2016, https://doi.org/10.1145/2959100.2959190): a multi-layer perceptron, the floor
    that every other model must beat.

    BARS calls it DNN.
    """
    embedding = inputs.embedding()
    return inputs.model(embedding, towers.MLP(embedding.out_shape, **mlp))


def fm(inputs: Inputs) -> Model:
    """FM (Rendle, ICDM 2010, https://doi.org/10.1109/ICDM.2010.127): bias, first order and inner products of all pairs
    of fields."""
    embedding = inputs.embedding()
    embeddings.start_small(embedding)
    return inputs.model(embedding, towers.FM(embedding.out_shape), unweighted=1, wide=True)


def wide_deep(inputs: Inputs, **mlp: Unpack[Deep]) -> Model:
    """Wide & Deep (Cheng et al., DLRS 2016, https://arxiv.org/abs/1606.07792): first order beside an MLP.

    The paper's hand-made crosses are features: add them to the data.
    """
    embedding = inputs.embedding()
    return inputs.model(embedding, towers.MLP(embedding.out_shape, **mlp), wide=True)


def deepfm(inputs: Inputs, **mlp: Unpack[Deep]) -> Model:
    """DeepFM (Guo et al., IJCAI 2017, https://arxiv.org/abs/1703.04247): a factorization machine and an MLP over the
    same embeddings, logits added."""
    embedding = inputs.embedding()
    embeddings.start_small(embedding)
    shape = embedding.out_shape
    # FM last: its gradient, the first of the two to exist, then takes the MLP's in place.
    tower = towers.Parallel(towers.MLP(shape, **mlp), towers.FM(shape))
    return inputs.model(embedding, tower, unweighted=1, wide=True)


def xdeepfm(inputs: Inputs, *, num_maps: Widths = (64, 64, 64), **mlp: Unpack[Deep]) -> Model:
    """xDeepFM (Lian et al., KDD 2018, https://arxiv.org/abs/1803.05170): compressed interaction network, MLP and first
    order, logits added."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = towers.Parallel(towers.MLP(shape, **mlp), towers.CIN(shape, num_maps=num_maps))
    return inputs.model(embedding, tower, wide=True)


def dcn(inputs: Inputs, *, num_cross_layers: int = 3, **mlp: Unpack[Deep]) -> Model:
    """DCN (Wang et al., ADKDD 2017, https://arxiv.org/abs/1708.05123): cross layers of rank one beside an MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = towers.Parallel(towers.CrossNet(shape, num_layers=num_cross_layers), towers.MLP(shape, **mlp))
    return inputs.model(embedding, tower)


def dcnv2(inputs: Inputs, *, num_cross_layers: int = 3, **mlp: Unpack[Deep]) -> Model:
    """DCN V2 (Wang et al., WWW 2021, https://arxiv.org/abs/2008.13535): cross layers of full rank beside an MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = towers.Parallel(towers.CrossNetV2(shape, num_layers=num_cross_layers), towers.MLP(shape, **mlp))
    return inputs.model(embedding, tower)


def dcnv2_mix(
    inputs: Inputs, *, num_cross_layers: int = 3, num_experts: int = 4, rank: int = 32, **mlp: Unpack[Deep]
) -> Model:
    """DCN-Mix (Wang et al., WWW 2021, https://arxiv.org/abs/2008.13535): cross layers that are a gated mixture of
    low-rank ones, beside an MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    cross = towers.CrossNetMix(shape, num_layers=num_cross_layers, num_experts=num_experts, rank=rank)
    return inputs.model(embedding, towers.Parallel(cross, towers.MLP(shape, **mlp)))


def gdcn(inputs: Inputs, *, num_cross_layers: int = 3, **mlp: Unpack[Deep]) -> Model:
    """GDCN-P (Wang et al., CIKM 2023, https://arxiv.org/abs/2311.04635): gated cross layers beside an MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = towers.Parallel(towers.GatedCrossNet(shape, num_layers=num_cross_layers), towers.MLP(shape, **mlp))
    return inputs.model(embedding, tower)


def dlrm(inputs: Inputs, **mlp: Unpack[Deep]) -> Model:
    """DLRM (Naumov et al., 2019, https://arxiv.org/abs/1906.00091): inner products of all pairs of fields, then an MLP;
    numeric fields pass beside them.

    The paper's bottom MLP makes one field of all numbers; here each number is a field.
    """
    embedding = inputs.embedding()
    schema = inputs.schema
    numbers = [schema.position(feature.name) for feature in schema.dense]
    dots = towers.DotInteraction(embedding.out_shape, dense_fields=numbers)
    return inputs.model(embedding, towers.Stack(dots, towers.MLP(dots.out_shape, **mlp)))


def autoint(
    inputs: Inputs, *, attention_dropout: float = 0.0, wide: bool = False, **attention: Unpack[Attention]
) -> Model:
    """AutoInt (Song et al., CIKM 2019, https://arxiv.org/abs/1810.11921): self-attention over the fields.

    Some rows of BARS add a first-order term (`wide`).
    """
    embedding = inputs.embedding()
    tower = towers.AutoInt(embedding.out_shape, dropout=attention_dropout, **attention)
    return inputs.model(embedding, tower, wide=wide)


def autoint_plus(
    inputs: Inputs,
    *,
    hidden: Widths = (400, 400),
    batch_norm: bool = False,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    wide: bool = False,
    **attention: Unpack[Attention],
) -> Model:
    """AutoInt+ (Song et al., CIKM 2019, https://arxiv.org/abs/1810.11921): self-attention over the fields beside an
    MLP."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = towers.Parallel(
        towers.AutoInt(shape, dropout=attention_dropout, **attention),
        towers.MLP(shape, hidden=hidden, batch_norm=batch_norm, dropout=dropout),
    )
    return inputs.model(embedding, tower, wide=wide)


def ipnn(inputs: Inputs, **mlp: Unpack[Deep]) -> Model:
    """IPNN (Qu et al., ICDM 2016, https://arxiv.org/abs/1611.00144): inner products of all pairs beside the fields,
    then an MLP."""
    embedding = inputs.embedding()
    products = towers.IPNN(embedding.out_shape)
    return inputs.model(embedding, towers.Stack(products, towers.MLP(products.out_shape, **mlp)))


def fgcnn(
    inputs: Inputs,
    *,
    num_channels: Widths = (14, 16, 18, 20),
    kernel_height: int = 7,
    pooling_size: int = 2,
    num_new: int = 3,
    share_embedding: bool = False,
    **mlp: Unpack[Deep],
) -> Model:
    """FGCNN (Liu et al., WWW 2019, https://arxiv.org/abs/1904.04447): a convolution over the fields makes new fields,
    and IPNN reads both.

    The convolution has tables of its own, unless `share_embedding`.
    """
    embedding = inputs.embedding()
    num_raw = None
    if not share_embedding:
        num_raw = embedding.out_shape[0]
        embedding = embeddings.ConcatFields(embedding, inputs.embedding(suffix="_convolution"))
    generator = towers.FGCNN(
        embedding.out_shape,
        num_raw=num_raw,
        num_channels=num_channels,
        kernel_height=kernel_height,
        pooling_size=pooling_size,
        num_new=num_new,
    )
    products = towers.IPNN(generator.out_shape)
    return inputs.model(embedding, towers.Stack(generator, products, towers.MLP(products.out_shape, **mlp)))


def fibinet(
    inputs: Inputs,
    *,
    bilinear: Bilinear = "field_interaction",
    reduction_ratio: float = 3,
    share_bilinear: bool = False,
    **mlp: Unpack[Deep],
) -> Model:
    """FiBiNET (Huang et al., RecSys 2019, https://arxiv.org/abs/1905.09433): bilinear products of raw and of reweighted
    fields, then an MLP, and first order."""
    embedding = inputs.embedding()
    products = towers.FiBiNET(
        embedding.out_shape, bilinear=bilinear, reduction_ratio=reduction_ratio, share_bilinear=share_bilinear
    )
    return inputs.model(embedding, towers.Stack(products, towers.MLP(products.out_shape, **mlp)), wide=True)


def masknet(
    inputs: Inputs,
    *,
    num_blocks: int = 3,
    block_dim: int = 64,
    reduction_ratio: float = 2.0,
    embedding_norm: bool = True,
    **mlp: Unpack[Deep],
) -> Model:
    """MaskNet, parallel (Wang et al., DLP-KDD 2021, https://arxiv.org/abs/2102.07619): mask blocks guided by the whole
    row, side by side, then an MLP."""
    embedding = inputs.embedding()
    blocks = towers.ParallelMaskNet(
        embedding.out_shape,
        num_blocks=num_blocks,
        block_dim=block_dim,
        reduction_ratio=reduction_ratio,
        embedding_norm=embedding_norm,
        dropout=mlp.get("dropout", 0.0),
    )
    return inputs.model(embedding, towers.Stack(blocks, towers.MLP(blocks.out_shape, **mlp)))


def masknet_serial(
    inputs: Inputs,
    *,
    hidden: Widths = (400, 400, 400),
    reduction_ratio: float = 2.0,
    embedding_norm: bool = True,
    dropout: float = 0.0,
) -> Model:
    """MaskNet, serial (Wang et al., DLP-KDD 2021, https://arxiv.org/abs/2102.07619): a chain of mask blocks guided by
    the whole row."""
    embedding = inputs.embedding()
    tower = towers.SerialMaskNet(
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
    """DualMLP (Mao et al., AAAI 2023, https://arxiv.org/abs/2304.00902): two MLPs over the same embeddings, logits
    added; FinalMLP's own baseline."""
    embedding = inputs.embedding()
    shape = embedding.out_shape
    tower = towers.Parallel(
        towers.MLP(shape, hidden=hidden_1, batch_norm=batch_norm_1, dropout=dropout_1),
        towers.MLP(shape, hidden=hidden_2, batch_norm=batch_norm_2, dropout=dropout_2),
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
    """FinalMLP (Mao et al., AAAI 2023, https://arxiv.org/abs/2304.00902): two gated MLPs and their bilinear fusion.

    `contexts` names the features that drive each MLP's gate, looked up in tables of their own.
    """
    embedding = inputs.embedding()
    num_fields = embedding.out_shape[0]
    positions: tuple[range, range] | None = None
    if contexts is not None:
        if len(contexts) != 2 or any(isinstance(names, str) or len({*names}) < len(names) for names in contexts):
            raise ArgumentError(
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
        embedding = embeddings.ConcatFields(*parts) if len(parts) > 1 else embedding
    tower = towers.FinalMLP(
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
    """FinalNet (Zhu et al., SIGIR 2023, https://doi.org/10.1145/3539618.3591988): layers that double the degree, in two
    blocks that also learn from their mean.

    `hidden_2=None` is the one-block model. The first block reads a gated copy of the fields too (`field_gate`).
    """
    embedding = inputs.embedding()
    shape = embedding.out_shape
    block = towers.FinalBlock(shape, hidden=hidden_1, field_gate=field_gate, batch_norm=batch_norm, dropout=dropout_1)
    if hidden_2 is None:
        return inputs.model(embedding, block)
    tower = towers.Parallel(block, towers.FinalBlock(shape, hidden=hidden_2, batch_norm=batch_norm, dropout=dropout_2))
    head = heads.EnsembleHead(
        tower.out_shape,
        widths=(hidden_1[-1], hidden_2[-1]),
        num_tasks=len(inputs.schema.labels),
        distill=distill,
    )
    return inputs.model(embedding, tower, head=head)


def eulernet(
    inputs: Inputs,
    *,
    num_orders: Widths = (52,),
    layer_norm: bool = False,
    explicit_dropout: float = 0.0,
    implicit_dropout: float = 0.0,
) -> Model:
    """EulerNet (Tian et al., SIGIR 2023, https://arxiv.org/abs/2304.10711): products of fields with learned exponents,
    in complex space."""
    embedding = inputs.embedding()
    tower = towers.EulerNet(
        embedding.out_shape,
        num_orders=num_orders,
        layer_norm=layer_norm,
        explicit_dropout=explicit_dropout,
        implicit_dropout=implicit_dropout,
    )
    return inputs.model(embedding, tower)
