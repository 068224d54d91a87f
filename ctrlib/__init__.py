"""ctrlib: recommender and click-through-rate models on PyTorch and TorchRec.

    raw rows --prepare--> prepared folder --loader--> Batch
    Batch --embedding--> (B, F, D) --tower--> (B, H) --head--> (B, T) logits

`import ctrlib as ctr` gives every public name below; each is imported when it is first used, so that metrics need no
torch and `ctrlib doctor` runs where TorchRec does not.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "schema": ("Categorical", "Feature", "MultiValued", "Numeric", "RawId", "Schema", "SchemaError", "Sequence"),
    "data.prepare": ("prepare",),
    "data.quantiles": ("quantile_edges",),
    "data.scan": ("DataError",),
    "data.fingerprint": ("fingerprint",),
    "data.loader": ("Loader",),
    "batch": ("Batch",),
    "embeddings.blocks": ("BlockTables", "BlockedVocabulary"),
    "embeddings.bst": ("BST",),
    "embeddings.combine": ("ConcatFields",),
    "embeddings.crosses": ("CrossTables",),
    "embeddings.din": ("DIN", "MiniBatchAwareL2"),
    "embeddings.hash_embedding": ("HashEmbeddingTables",),
    "embeddings.managed": ("ManagedEmbedding", "ManagedSharder"),
    "embeddings.numeric": ("AutoDis", "Bucketised", "Periodic", "PiecewiseLinear", "ValueTimesVector"),
    "embeddings.memcom": ("MemComTables",),
    "embeddings.mixed_dimension": ("MixedDimensionTables", "mixed_dimensions"),
    "embeddings.narrow": ("NarrowTable", "NarrowTables"),
    "embeddings.packed": ("PackedTable", "PackedTables"),
    "embeddings.quotient_remainder": ("QuotientRemainderTables", "quotient_remainder_rows"),
    "embeddings.sequence": ("MeanPooling", "SequenceEmbedding", "Unit"),
    "embeddings.sim": ("SIM", "TargetAttention"),
    "embeddings.tim": ("InterestEmbedding", "TaskInterests"),
    "embeddings.unified": ("UnifiedTables", "proportional_rows"),
    "embeddings.table": ("TableEmbedding", "Wide"),
    "towers.apem": ("APEM", "SetAttention"),
    "towers.autoint": ("AutoInt", "InteractingLayer"),
    "towers.cin": ("CIN",),
    "towers.combine": ("Parallel", "Stack"),
    "towers.crossnet": ("CrossNet", "CrossNetMix", "CrossNetV2"),
    "towers.dlrm": ("DotInteraction",),
    "towers.dtrn": ("TaskRefinement",),
    "towers.eulernet": ("EulerNet",),
    "towers.fgcnn": ("FGCNN",),
    "towers.fibinet": ("FiBiNET",),
    "towers.finalmlp": ("BilinearFusion", "FinalMLP"),
    "towers.finalnet": ("FactorizedInteraction", "FinalBlock"),
    "towers.fm": ("FM",),
    "towers.gdcn": ("GatedCrossNet",),
    "towers.ipnn": ("IPNN",),
    "towers.masknet": ("ParallelMaskNet", "SerialMaskNet"),
    "towers.mlp": ("MLP",),
    "towers.streams": ("Flatten", "Streams"),
    "heads.aitm": ("AITM",),
    "heads.ensemble": ("EnsembleHead",),
    "heads.esmm": ("ESMM",),
    "heads.linear": ("LinearHead",),
    "heads.mmoe": ("MMoE",),
    "heads.ple": ("PLE",),
    "heads.shared_bottom": ("SharedBottom",),
    "heads.stacked": ("TaskTowers",),
    "heads.stem": ("STEM",),
    "model": ("Ensemble", "Model"),
    "presets": ("Inputs",),
    "losses": ("binary_cross_entropy", "given_previous", "uncertainty_weighted"),
    "training.batch_norm": ("synchronise_batch_norm",),
    "training.checkpoint": ("CheckpointError", "Checkpoints", "Shards"),
    "training.evaluate": ("evaluate", "predict"),
    "training.exact": ("ExactEngine",),
    "training.fused": ("FusedEngine",),
    "training.loop": ("LostProcessError", "NonFiniteLossError", "Terminated", "fit", "to_json"),
    "training.plan": ("load_plan", "make_plan", "plan_bytes", "save_plan", "show_plan", "tables_of"),
    "training.recipe": ("RecipeKnobs", "run_ensemble_recipe", "run_recipe"),
    "training.rowwise_adagrad": ("RowwiseAdagrad",),
    "training.run": ("make_engine", "record", "run"),
    "training.progress": ("random_state", "set_random_state"),
    "training.shard": ("shard", "sharded_state", "whole_weights"),
    "training.transfer": ("compare_tasks", "draw_transfer", "gate_usage", "gradient_cosines", "step_scores"),
    "training.state": ("adam", "optimiser_state"),
    "search.bytes": ("Bytes", "bytes_of"),
    "search.compress": ("compress",),
    "search.distil": ("distil",),
    "search.dnis": ("DNIS",),
    "search.evolution": ("Evolution", "evolve"),
    "search.floors": ("frequency_cut", "keep_rows", "magnitudes", "reads", "rounded_rows"),
    "search.fold": ("fold",),
    "search.histogram": ("histogram",),
    "search.low_rank": ("Goal", "apply_low_rank", "low_rank"),
    "search.optembed": ("OptEmbed",),
    "search.optfs": ("OptFS",),
    "search.optinter": ("OptInter",),
    "search.plan": ("Plan", "materialise"),
    "search.run": ("search_and_retrain",),
    "search.transform_coding": ("transform_coding",),
    "serving.warm_start": ("warm_start",),
    "serving.predictor": ("Predictor", "save_model"),
}
# Reached as attributes too: `ctr.metrics.auc`, `ctr.presets.dcnv2`.
_MODULES = ("metrics", "presets", "testing")
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted((*_MODULE_OF, *_MODULES))
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF and name not in _MODULES:
        raise AttributeError(f"module 'ctrlib' has no attribute {name!r}; it has {__all__}")
    try:
        module = importlib.import_module(f"ctrlib.{_MODULE_OF.get(name, name)}")
    except (ImportError, OSError) as error:
        from ctrlib.doctor import hint

        if advice := hint(error):
            raise ImportError(f"{error}. {advice}") from error
        raise
    if name in _MODULES:
        return module
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
