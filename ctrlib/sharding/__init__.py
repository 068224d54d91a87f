"""Which process holds which rows of which table, and tables spread that way by TorchRec."""

from ctrlib import _lazy

__getattr__, __dir__ = _lazy.named(
    __name__,
    {
        "plan": (
            *("ShardingPlan", "TablePlacement", "tables_of", "make_plan", "check_plan", "plan_bytes", "show_plan"),
            *("load_plan", "save_plan"),
        ),
        "sharded": ("shard", "sharded_state", "load_weights", "whole_weights"),
        "shards": ("Shards", "State"),
    },
)
