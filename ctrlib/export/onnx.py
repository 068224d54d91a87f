"""ONNX: the program with look-ups as Gather, and sums over bags as ScatterND, where torch's exporter writes a Loop."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.onnx import OnnxExporterError

from ctrlib.errors import UnsupportedError
from ctrlib.export.program import quiet

aten = torch.ops.aten


def to_onnx(program: ExportedProgram, path: Path, names: list[str]) -> None:
    """Write an exported program as ONNX, opset 18, with `logits` as its output.

    Raises:
        UnsupportedError: an operation of the model has no counterpart there.
    """
    try:
        with quiet():
            torch.onnx.export(
                program.run_decompositions(DECOMPOSED),
                f=path,
                input_names=names,
                output_names=["logits"],
                opset_version=18,
                external_data=False,
                custom_translation_table={aten.__rshift__.Tensor: _right_shift},
                verbose=False,
            )
    except (OnnxExporterError, RuntimeError, NotImplementedError) as error:
        lines = [line for line in str(error).splitlines() if "No ONNX function" in line or "Error when" in line]
        why = re.sub(r"\s+", " ", lines[0])[:200] if lines else type(error).__name__
        raise UnsupportedError(f"this model has no ONNX form ({why}): export it to pt2") from error


def quantise(path: Path, out: Path) -> None:
    """Matrices of an ONNX model as 8-bit integers with a scale each; tables and everything else stay as they are.

    Unsigned, since signed ones overflow on processors without VNNI. What makes vectors of small rows is of the tables.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(path)
    of_tables = [node.name for node in model.graph.node if any(kind in _inside(node) for kind in SMALL_TABLES)]
    del model.graph.value_info[:]  # shapes of matrices as they were before, which the quantiser takes for wrong
    quantize_dynamic(
        model,
        out,
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=QuantType.QUInt8,
        nodes_to_exclude=of_tables,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
    )


def strip(path: Path, out: Path) -> None:
    """Leave out what torch's exporter notes down for each node: many bytes, and where the code lay."""
    import onnx

    model = onnx.load(path)
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        del part.metadata_props[:]
    onnx.save(model, out)


SMALL_TABLES = ("PackedTables", "PackedEvents", "NarrowTables", "NarrowEvents", "_DirectPacked")


def _inside(node: Any) -> str:
    """The classes of the modules that a node comes from, as torch's exporter notes them down."""
    return " ".join(one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.class_hierarchy")


def row_of_each(offsets: Tensor, count: Any) -> Tensor:
    """The row that each of N values belongs to: offsets (B + 1,) -> (N,).

    >>> row_of_each(torch.tensor([0, 2, 2, 3]), 3).tolist()
    [0, 0, 2]
    """
    ends = torch.zeros(count + 1, dtype=torch.int64)
    ends = ends.scatter_add(0, offsets[1:], torch.ones_like(offsets[1:]))
    return ends.cumsum(0)[:count]


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not include_last_offset:
        offsets = torch.cat([offsets, offsets.new_full((1,), indices.shape[0])])
    vectors = weight.index_select(0, indices)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.unsqueeze(1)
    rows = row_of_each(offsets, indices.shape[0])
    sums = vectors.new_zeros(offsets.shape[0] - 1, weight.shape[1]).index_put([rows], vectors, accumulate=True)
    if mode == 1:
        sums = sums / offsets.diff().clamp(min=1).unsqueeze(1)
    return sums, rows, offsets, offsets


def _repeat_interleave(x: Tensor, repeats: Tensor, dim: int | None = None, *, output_size: Any = None) -> Tensor:
    offsets = torch.nn.functional.pad(repeats.cumsum(0), (1, 0))
    return x.index_select(dim or 0, row_of_each(offsets, output_size))


def _remainder(x: Tensor, divisor: Any) -> Tensor:
    return torch.remainder(x, torch.full((), divisor, dtype=x.dtype))


def _argsort(x: Tensor, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Tensor:
    # Of equal numbers, ONNX's TopK puts the earlier one first.
    return x.topk(x.shape[dim], dim, largest=descending).indices


def _right_shift(x: Any, shifts: Any) -> Any:
    """In ONNX's own operations, which shift unsigned numbers only: bits that come in from the left are 0.

    torch brings ones into negative numbers; what shifts here masks these off.
    """
    from onnxscript import ir, opset18

    op: Any = opset18
    unsigned = {ir.DataType.INT32: ir.DataType.UINT32, ir.DataType.INT64: ir.DataType.UINT64}.get(x.dtype)
    if unsigned is None:
        return op.BitShift(x, shifts, direction="RIGHT")
    shifted = op.BitShift(op.Cast(x, to=unsigned), op.Cast(shifts, to=unsigned), direction="RIGHT")
    return op.Cast(shifted, to=x.dtype)


def _foreach_add(tensors: list[Tensor], scalars: list[Any]) -> list[Tensor]:
    return [tensor + scalar for tensor, scalar in zip(tensors, scalars)]


def _foreach_mul(tensors: list[Tensor], scalars: list[Any]) -> list[Tensor]:
    return [tensor * scalar for tensor, scalar in zip(tensors, scalars)]


def _to_padded(values: Tensor, offsets: list[Tensor], max_lengths: list[Any], padding_value: float = 0.0) -> Tensor:
    rows = row_of_each(offsets[0], values.shape[0])
    places = torch.arange(values.shape[0]) - offsets[0][rows]
    padded = values.new_full((offsets[0].shape[0] - 1, max_lengths[0], values.shape[1]), padding_value)
    return padded.index_put([rows, places], values)


def _complete_cumsum(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x.cumsum(0), (1, 0))


DECOMPOSED: dict[Any, Any] = {
    aten._foreach_add.ScalarList: _foreach_add,
    aten._foreach_mul.ScalarList: _foreach_mul,
    torch.ops.fbgemm.jagged_to_padded_dense.default: _to_padded,
    torch.ops.fbgemm.jagged_to_padded_dense_forward.default: _to_padded,
    torch.ops.fbgemm.asynchronous_complete_cumsum.default: _complete_cumsum,
    aten.remainder.Scalar: _remainder,
    aten.argsort.stable: _argsort,
    aten.embedding_bag.padding_idx: _embedding_bag,
    aten.repeat_interleave.self_Tensor: _repeat_interleave,
}
