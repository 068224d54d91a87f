"""A trainer of one's own: the loop is yours, ctrlib gives the model, the sharded tables and the checkpoints.

    torchrun --nproc-per-node 2 recipes/own_trainer.py --data data/movielens_100k --out runs/own

Kill it and start it again: it goes on, in the middle of an epoch. `ctrlib train` and `ctr.run` do all this and more.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro

import ctrlib as ctr


@dataclass(frozen=True)
class Knobs:
    """Train DCNv2 on a prepared folder, its tables spread over the processes that torchrun started."""

    data: Path
    """The prepared folder."""
    out: Path
    """Folder for the checkpoints."""
    batch_size: int = 1024
    """Rows a step and process."""
    epochs: int = 2
    """Passes over the training rows."""
    checkpoint_steps: int = 50
    """Steps between checkpoints."""


def main(knobs: Knobs) -> None:
    """Train, saving now and then, and print the validation AUC."""
    torch.manual_seed(0)  # every process builds the same model
    schema = ctr.Schema.load(knobs.data)
    model = ctr.models.dcnv2(ctr.Inputs(schema, embedding_dim=8, stacked=4), hidden=(64, 64))
    tables = set(ctr.sharding.tables_of(model))  # with batch normalisation: ctr.training.synchronise_batch_norm(model)
    sharded = ctr.sharding.shard(model, learning_rate=0.02)  # tables: row-wise Adagrad inside the backward pass

    rank, world_size = dist.get_rank(), dist.get_world_size()
    dense = {name: weight for name, weight in sharded.named_parameters() if name not in tables}
    optimiser = ctr.training.make_adam(dense, 1e-3)
    state = {**ctr.sharding.sharded_state(sharded), **ctr.training.optimiser_state(optimiser, dense)}
    share = {"batch_size": knobs.batch_size, "rank": rank, "world_size": world_size}
    train = ctr.Loader(knobs.data, "train", shuffle=True, **share)
    valid = ctr.Loader(knobs.data, "valid", **share)

    with ctr.Checkpoints(knobs.out) as checkpoints:
        saved = checkpoints.load(state)
        if saved is not None:
            train.load_state_dict(saved["loader"])
            ctr.training.set_random_state(saved["random_state"], world_size)
        step = 0 if saved is None else saved["step"]
        while train.epoch < knobs.epochs:
            for batch in train:
                loss = ctr.binary_cross_entropy(sharded(batch), batch.labels, batch.weights)
                optimiser.zero_grad()
                loss.backward()  # moves the tables' rows, and averages the other gradients over the processes
                optimiser.step()
                step += 1
                if step % knobs.checkpoint_steps == 0:
                    where = {"loader": train.state_dict(), "step": step, "random_state": ctr.training.random_state()}
                    checkpoints.save(step, state, where)

    scores = ctr.evaluate(sharded, valid)
    weights = ctr.sharding.whole_weights(sharded)  # plain tensors, on rank 0: what an unsharded model loads
    if rank == 0:
        print(f"step {step}: valid AUC {scores['auc']:.4f}, {sum(map(torch.numel, weights.values())):,} weights")


if __name__ == "__main__":
    main(tyro.cli(Knobs))
