"""ctrlib: recommender and click-through-rate models on PyTorch and TorchRec.

    raw rows --prepare--> prepared folder --loader--> Batch
    Batch --embedding--> (B, F, D) --tower--> (B, H) --head--> (B, T) logits

`import ctrlib as ctr` gives the names that most programs need; `ctr.towers`, `ctr.heads`, `ctr.embeddings` and
`ctr.models` hold all parts, `ctr.search`, `ctr.sharding`, `ctr.training`, `ctr.ranking` and `ctr.analysis` what is
done with them. Each name is imported when it is first used, so that metrics need no torch and `ctrlib doctor` runs
where TorchRec does not.
"""

from __future__ import annotations

from ctrlib import _lazy

_NAMES = {
    "errors": ("CtrlibError",),
    "schema": ("Categorical", "Feature", "MultiValued", "Numeric", "RawId", "Schema", "SchemaError", "Sequence"),
    "data.encoder": ("Encoder",),
    "data.events": ("Events", "History"),
    "data.prepare": ("prepare",),
    "data.quantiles": ("quantile_edges",),
    "data.scan": ("DataError",),
    "data.fingerprint": ("fingerprint",),
    "data.loader": ("Loader",),
    "batch": ("Batch",),
    "embeddings.table": ("TableEmbedding", "Wide"),
    "towers.combine": ("Parallel", "Stack"),
    "towers.crossnet": ("CrossNetV2",),
    "towers.fm": ("FM",),
    "towers.mlp": ("MLP",),
    "heads.linear": ("LinearHead",),
    "inputs": ("Inputs",),
    "model": ("Ensemble", "Model"),
    "losses": ("binary_cross_entropy",),
    "training.exact": ("ExactEngine",),
    "training.fused": ("FusedEngine",),
    "training.loop": ("fit",),
    "training.run": ("run",),
    "training.evaluate": ("evaluate", "predict"),
    "training.checkpoint": ("CheckpointError", "Checkpoints"),
    "ranking.run": ("rank",),
    "serving.model_folder": ("save_model",),
    "serving.predictor": ("Predictor",),
    "serving.update": ("update",),
    "serving.warm_start": ("warm_start",),
    "estimator": ("CTRClassifier",),
    "selection.comparison": ("compare",),
    "selection.tuning": ("tune",),
}
_MODULES = (*_lazy.PACKAGES, "losses", "metrics", "plots", "testing")
__version__ = "0.1.0"
__getattr__, __dir__ = _lazy.named(__name__, _NAMES, _MODULES)
__all__ = __dir__()
