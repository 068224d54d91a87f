"""DTRN-style refinement and interests: whose weights matter to whom, exact equalities, planted conflicts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

import ctrlib as ctr
from ctrlib.batch import Batch
from ctrlib.data.synthetic import conflict
from ctrlib.testing import example_batch, example_schema

B, NUM_FIELDS, D, T = 9, 5, 4, 3


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("specific", [False, True])
def test_refinement_follows_the_equation(per_element: bool, specific: bool) -> None:
    shape = (T, NUM_FIELDS, D) if specific else (NUM_FIELDS, D)
    tower = ctr.towers.TaskRefinement(shape, num_tasks=T, per_element=per_element, shared_stream=True)
    for bias in (tower.squeeze_bias, tower.excite_bias):
        nn.init.normal_(bias)
    x = torch.randn(T, B, NUM_FIELDS, D) if specific else torch.randn(B, NUM_FIELDS, D)
    out = tower(x)
    assert out.shape == (T + 1, B, NUM_FIELDS * D) and tower.out_shape == (T + 1, NUM_FIELDS * D)
    for task in range(T):
        own = x[task] if specific else x
        hidden = torch.relu(own.flatten(1) @ tower.squeeze[task] + tower.squeeze_bias[task])
        gates = 2 * torch.sigmoid(hidden @ tower.excite[task] + tower.excite_bias[task])
        refined = gates.view(B, NUM_FIELDS, -1) * own
        torch.testing.assert_close(out[task], refined.flatten(1))
        torch.testing.assert_close(tower.gate_weights(x)[task], gates)
    torch.testing.assert_close(out[T], (x.mean(0) if specific else x).flatten(1))


def test_refinements_learn_from_their_own_task_only() -> None:
    tower = ctr.towers.TaskRefinement((NUM_FIELDS, D), num_tasks=T)
    head = ctr.heads.SharedBottom(tower.out_shape, num_tasks=T, bottom_hidden=(8,), tower_hidden=())
    logits = head(tower(torch.randn(B, NUM_FIELDS, D)))
    for task in range(T):
        others = [other for other in range(T) if other != task]
        for grad in torch.autograd.grad(logits[:, task].sum(), list(tower.parameters()), retain_graph=True):
            assert grad[task].abs().sum() > 0
            assert torch.count_nonzero(grad[others]) == 0
        (shared,) = torch.autograd.grad(logits[:, task].sum(), [head.bottom[0].weight], retain_graph=True)
        assert shared.abs().sum() > 0


J, L = 2, 6


def interests(num_tasks: int = T, num_behaviours: int = J, **arguments: int) -> ctr.embeddings.TaskInterests:
    """With a hypernetwork that does not ignore its input, as it does at the start."""
    module = ctr.embeddings.TaskInterests(8, num_tasks=num_tasks, num_behaviours=num_behaviours, **arguments)
    nn.init.normal_(module.hyper[2].weight, std=0.3)
    nn.init.normal_(module.scale)
    return module


def histories() -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.randint(1, L + 1, (J, B))
    lengths[:, 0], lengths[0, 1] = 0, 0
    return torch.randn(J, B, L, 8), torch.arange(L) < lengths.unsqueeze(2), torch.randn(B, 8)


def naive(module: ctr.embeddings.TaskInterests, x: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Task by task, behaviour by behaviour, row by row, with the whole block each time."""
    out = torch.zeros(len(module.tasks), B, J, 8)
    width = 8 // module.num_heads
    for t, task in enumerate(module.tasks):
        for j, behaviour in enumerate(module.behaviours):
            gamma_1, beta_1, gamma_2, beta_2 = module.hyper(torch.cat([task, behaviour])).chunk(4)
            for b in range(B):
                events = x[j, b][mask[j, b]]
                if not len(events):
                    continue
                query, key, value = module.query_key_value(events).chunk(3, dim=1)
                heads = [slice(h * width, (h + 1) * width) for h in range(module.num_heads)]
                read = [(query[:, h] @ key[:, h].T / width**0.5).softmax(1) @ value[:, h] for h in heads]
                events = events + module.out(torch.cat(read, dim=1))
                events = nn.functional.layer_norm(events, (8,), gamma_1, beta_1)
                events = nn.functional.layer_norm(events + module.feed_forward(events), (8,), gamma_2, beta_2)
                out[t, b, j] = module.scale * ((events @ module.target_query(target[b]) / 8**0.5).softmax(0) @ events)
    return out


def test_interests_are_those_of_a_double_loop() -> None:
    module, inputs = interests(), histories()
    fast, slow = module(*inputs), naive(module, *inputs)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-5)
    projection = torch.randn_like(fast)
    weights = list(module.parameters())
    of_fast, of_slow = (torch.autograd.grad((out * projection).sum(), weights) for out in (fast, slow))
    for a, b in zip(of_fast, of_slow):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_tasks_read_alike_at_the_start() -> None:
    """The hypernetwork begins as gamma = 1, beta = 0: a plain transformer block, the same bits for every task."""
    module, (x, mask, target) = ctr.embeddings.TaskInterests(8, num_tasks=T, num_behaviours=J), histories()
    out = module(x, mask, target)
    assert all(torch.equal(out[task], out[0]) for task in range(T))
    plain = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    attention = module.query_key_value, module.out
    with torch.no_grad():
        plain.self_attn.in_proj_weight.copy_(attention[0].weight)
        plain.self_attn.in_proj_bias.copy_(attention[0].bias)
        plain.self_attn.out_proj.load_state_dict(attention[1].state_dict())
        plain.linear1.load_state_dict(module.feed_forward[0].state_dict())
        plain.linear2.load_state_dict(module.feed_forward[2].state_dict())
    events = plain(x[1, 2:3], src_key_padding_mask=~mask[1, 2:3])[0]
    scores = (events @ module.target_query(target[2]) / 8**0.5).masked_fill(~mask[1, 2], -torch.inf)
    torch.testing.assert_close(out[0, 2, 1], scores.softmax(0) @ events)


def test_a_condition_moves_its_own_outputs_only() -> None:
    module, inputs = interests(), histories()
    before = module(*inputs)
    with torch.no_grad():
        module.tasks[1] += 1
    after = module(*inputs)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert (after[1] - before[1]).abs().max() > 1e-3
    with torch.no_grad():
        module.behaviours[1] += 1
    moved = module(*inputs)
    assert torch.equal(moved[:, :, 0], after[:, :, 0])
    assert ((moved[:, :, 1] - after[:, :, 1]).abs().amax((1, 2)) > 1e-3).all()


def test_a_task_teaches_the_shared_block_and_its_own_embedding() -> None:
    module, inputs = interests(), histories()
    of_tasks, of_shared = torch.autograd.grad(module(*inputs)[0].sum(), [module.tasks, module.feed_forward[0].weight])
    assert of_tasks[0].abs().sum() > 0 and of_shared.abs().sum() > 0
    assert torch.count_nonzero(of_tasks[1:]) == 0


def test_what_is_masked_is_not_seen() -> None:
    module, (x, mask, target) = interests(), histories()
    x.requires_grad_()
    out = module(x, mask, target)
    garbage = torch.where(mask.unsqueeze(3), x, 100 * torch.randn_like(x))
    # An empty history's events are masked too, and its output is zero whatever they hold.
    assert torch.equal(module(garbage, mask, target), out)
    assert torch.count_nonzero(out[:, 0]) == 0 and torch.count_nonzero(out[:, 1, 0]) == 0
    assert out[:, 1, 1].abs().amax(1).min() > 0
    (grad,) = torch.autograd.grad(out.square().sum(), [x])
    assert torch.isfinite(grad).all()
    assert torch.count_nonzero(grad[~mask]) == 0


def test_one_more_task_or_behaviour_costs_an_embedding() -> None:
    def size(num_tasks: int, num_behaviours: int) -> int:
        module = ctr.embeddings.TaskInterests(64, num_tasks=num_tasks, num_behaviours=num_behaviours, condition_dim=8)
        return sum(weight.numel() for weight in module.parameters())

    assert size(8, 6) - size(2, 3) == 9 * 8


def test_interests_are_fields_in_the_schemas_order() -> None:
    schema = example_schema(2)
    embedding = ctr.embeddings.InterestEmbedding(
        schema.features, target="item", num_tasks=2, embedding_dim=4, init_std=1.0
    )
    nn.init.normal_(embedding.interests.hyper[2].weight, std=0.3)
    batch = example_batch(schema, 7)
    out = embedding(batch)
    names = [feature.name for feature in schema.features]
    history, item = names.index("history"), names.index("item")
    others = [n for n in range(6) if n != history]
    assert out.shape == (2, 7, 6, 4)
    assert torch.equal(out[0][:, others], out[1][:, others])
    table = embedding.tables.embeddings["table_item"].weight
    jagged = batch.sparse.to_dict()
    assert torch.equal(out[0, :, item], table[jagged["item"].values()])
    for row, events in enumerate(jagged["history"].to_dense()):
        expected = embedding.interests(
            table[events][None, None], torch.ones(1, 1, len(events), dtype=torch.bool), out[0, row : row + 1, item]
        )
        if len(events):
            torch.testing.assert_close(out[:, row, history], expected[:, 0, 0])
        else:
            assert torch.count_nonzero(out[:, row, history]) == 0


def test_interests_start_as_small_as_the_rows_of_the_tables() -> None:
    """A LayerNorm's output does not shrink with its input, and would drown the other fields."""
    schema = example_schema(2)
    embedding = ctr.embeddings.InterestEmbedding(
        schema.features, target="item", num_tasks=2, embedding_dim=8, init_std=1e-3
    )
    batch = example_batch(schema, 64)
    interests = embedding(batch)[:, batch.sparse["history"].lengths() > 0, schema.position("history")]
    assert 0.1e-3 < interests.std().item() < 3e-3


def test_interests_without_tasks_are_those_of_one_task() -> None:
    schema = example_schema(2)
    alike, one = (
        ctr.embeddings.InterestEmbedding(
            schema.features, target="item", num_tasks=num_tasks, embedding_dim=4, init_std=1.0
        )
        for num_tasks in (None, 1)
    )
    alike.load_state_dict(one.state_dict())
    batch = example_batch(schema, 7)
    assert torch.equal(alike(batch), one(batch)[0])
    assert alike.out_shape == one.out_shape[1:] == (6, 4)


def test_interests_and_refinement_train_in_front_of_any_head() -> None:
    schema = example_schema(2)
    heads = {
        "mmoe": lambda shape: ctr.heads.MMoE(shape, num_tasks=2, num_experts=2, expert_hidden=(8,), tower_hidden=()),
        "ple": lambda shape: ctr.heads.PLE(shape, num_tasks=2, expert_hidden=(8,), tower_hidden=()),
        "esmm": lambda shape: ctr.heads.ESMM(shape, hidden=(8,)),
        "aitm": lambda shape: ctr.heads.AITM(shape, num_tasks=2, tower_hidden=(8,)),
    }
    batch = example_batch(schema, 64)
    for name, make in heads.items():
        torch.manual_seed(0)
        embedding = ctr.embeddings.InterestEmbedding(schema.features, target="item", num_tasks=2, embedding_dim=4)
        tower = ctr.towers.TaskRefinement(embedding.out_shape, num_tasks=2, shared_stream=name == "ple")
        model = ctr.Model(embedding, tower, make(tower.out_shape))
        engine = ctr.ExactEngine(model, learning_rate=0.005)
        losses = [engine.step(batch).item() for _ in range(60)]
        assert losses[-1] < 0.7 * losses[0], name
        for parameter in model.parameters():
            assert parameter.grad is not None


# Rows of tables with planted tasks, as batches.
def batches(ids: Tensor, labels: Tensor, size: int) -> list[Batch]:
    names = [f"f{field}" for field in range(ids.shape[1])]
    made = []
    for chunk, target in zip(ids.split(size), labels.split(size)):
        sparse = KeyedJaggedTensor.from_lengths_sync(
            names, chunk.T.reshape(-1) + 3, torch.ones(chunk.numel(), dtype=torch.int64)
        )
        made.append(Batch(sparse, torch.zeros(len(chunk), 0), target, torch.ones(len(chunk))))
    return made


def tables(num_fields: int, num_values: int, embedding_dim: int) -> ctr.TableEmbedding:
    features = [ctr.Categorical(f"f{field}", num_embeddings=num_values + 3) for field in range(num_fields)]
    return ctr.TableEmbedding(features, embedding_dim=embedding_dim, init_std=0.1)


def train(model: ctr.Model, ids: Tensor, labels: Tensor, *, epochs: int, size: int, rate: float) -> None:
    engine = ctr.ExactEngine(model, learning_rate=rate)
    model.train()
    for epoch in range(epochs):
        if epoch == epochs - 1:
            engine.learning_rates = [rate / 10]
        order = torch.randperm(len(ids))
        for batch in batches(ids[order], labels[order], size):
            engine.step(batch)


def test_planted_gates() -> None:
    """y_A reads f0 and f2, y_B reads -f0 and f1: each task closes the field that only the other needs."""
    torch.manual_seed(0)
    ids = torch.randint(40, (30_000, 6))
    w, u, v = torch.randn(3, 40)
    logits = torch.stack([2 * w[ids[:, 0]] + 2 * v[ids[:, 2]], -2 * w[ids[:, 0]] + 2 * u[ids[:, 1]]], dim=1)
    labels = torch.bernoulli(logits.sigmoid())
    embedding = tables(6, 40, 8)
    tower = ctr.towers.TaskRefinement(embedding.out_shape, num_tasks=2)
    head = ctr.heads.SharedBottom(tower.out_shape, num_tasks=2, bottom_hidden=(32,), tower_hidden=())
    train(ctr.Model(embedding, tower, head), ids, labels, epochs=4, size=512, rate=0.01)
    with torch.no_grad():
        gates = tower.gate_weights(embedding(batches(ids, labels, len(ids))[0])).mean(1)
    of_a, of_b = gates.tolist()
    assert of_a[1] < 0.5 * min(of_a[0], of_a[2])
    assert of_b[2] < 0.5 * of_b[1]


def test_planted_interests() -> None:
    """A repeats clicks, B repeats purchases: whether an item is among few others, which a mean of rows blurs."""
    torch.manual_seed(0)
    num_rows, length, num_items = 8000, 4, 40
    item = torch.randint(num_items, (num_rows,))
    events = torch.randint(num_items, (2, num_rows, length))
    planted = torch.rand(2, num_rows) < 0.5
    events[..., 0] = torch.where(planted, item, events[..., 0])
    repeated = (events == item.unsqueeze(1)).any(2).float()
    labels = torch.bernoulli(0.1 + 0.8 * repeated).T  # the best possible AUC is 0.9
    names = ("item", "clicks", "buys")
    features = [
        ctr.Categorical("item", num_embeddings=num_items + 3),
        *(ctr.Sequence(name, vocabulary="item", num_embeddings=num_items + 3) for name in names[1:]),
    ]

    def batch(rows: Tensor) -> Batch:
        values = torch.cat([item[rows], events[:, rows].flatten()]) + 3
        lengths = torch.tensor([1, length, length]).repeat_interleave(len(rows))
        sparse = KeyedJaggedTensor.from_lengths_sync(list(names), values, lengths)
        return Batch(sparse, torch.zeros(len(rows), 0), labels[rows], torch.ones(len(rows)))

    def aucs(embedding: nn.Module) -> list[float]:
        tower = ctr.towers.TaskRefinement(embedding.out_shape, num_tasks=2)
        head = ctr.heads.SharedBottom(tower.out_shape, num_tasks=2, bottom_hidden=(16,), tower_hidden=())
        model = ctr.Model(embedding, tower, head)
        engine = ctr.ExactEngine(model, learning_rate=0.01)
        for _ in range(10):
            for rows in torch.randperm(num_rows // 2).split(250):
                engine.step(batch(rows))
        tasks = ctr.evaluate(model, [batch(torch.arange(num_rows // 2, num_rows))], quick=True)["tasks"]
        return [task["auc"] for task in tasks]

    common = {"embedding_dim": 8, "init_std": 0.5}
    units = [ctr.embeddings.Unit(("item",), (name,), ctr.embeddings.MeanPooling(8)) for name in names[1:]]
    assert max(aucs(ctr.embeddings.SequenceEmbedding(features, units=units, **common))) < 0.8
    assert min(aucs(ctr.embeddings.InterestEmbedding(features, target="item", num_tasks=2, **common))) > 0.82


NUM_TASKS, WIDTH, ROWS, HELD_OUT = 3, 6, 16_000, 8_000
ONE_LAYER = {"expert_hidden": (WIDTH,), "tower_hidden": ()}
# Each task's path has the same WIDTH hidden units.
ANSWERS: dict[str, Callable[[tuple[int, int], int], tuple[nn.Module, nn.Module]]] = {
    "shared_bottom": lambda s, t: (
        f := ctr.towers.Flatten(s),
        ctr.heads.SharedBottom(f.out_shape, num_tasks=t, bottom_hidden=(WIDTH,), tower_hidden=()),
    ),
    "dtrn": lambda s, t: (
        r := ctr.towers.TaskRefinement(s, num_tasks=t),
        ctr.heads.SharedBottom(r.out_shape, num_tasks=t, bottom_hidden=(WIDTH,), tower_hidden=()),
    ),
    "ple": lambda s, t: (
        f := ctr.towers.Flatten(s),
        ctr.heads.PLE(f.out_shape, num_tasks=t, num_own=1, num_shared=1, **ONE_LAYER),
    ),
    "stem": lambda s, t: (
        f := ctr.towers.Streams(s, num_streams=t + 1),
        ctr.heads.STEM(f.out_shape, num_tasks=t, **ONE_LAYER),
    ),
}


def test_planted_conflict_hurts_a_shared_bottom_and_no_other() -> None:
    """A bottom too narrow for three tasks: shared-bottom loses to single-task, the others win the gap back."""
    frame, logits = conflict(ROWS + HELD_OUT, num_tasks=NUM_TASKS)
    labels = torch.from_numpy(frame.select(frame.columns[:NUM_TASKS]).to_numpy()).float()
    ids = torch.from_numpy(frame.select(frame.columns[NUM_TASKS:]).to_numpy())

    def auc(name: str, tasks: list[int]) -> float:
        torch.manual_seed(1)
        width = 8 * (len(tasks) + 1 if name == "stem" else 1)
        embedding = tables(ids.shape[1], 20, width)
        tower, head = ANSWERS[name](embedding.out_shape, len(tasks))
        model = ctr.Model(embedding, tower, head)
        train(model, ids[:ROWS], labels[:ROWS, tasks], epochs=8, size=800, rate=0.02)
        return ctr.evaluate(model, batches(ids[ROWS:], labels[ROWS:, tasks], HELD_OUT), quick=True)["auc"]

    everything = list(range(NUM_TASKS))
    scores = {name: auc(name, everything) for name in ANSWERS}
    single = sum(auc("shared_bottom", [task]) for task in everything) / NUM_TASKS
    bayes = sum(ctr.metrics.auc(labels[ROWS:, task], logits[ROWS:, task]) for task in everything) / NUM_TASKS
    gap = single - scores["shared_bottom"]
    assert gap > 0.01
    assert single < bayes
    for name in ("dtrn", "ple", "stem"):
        assert bayes > scores[name] > single - 0.1 * gap, (name, single, scores)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ctr.towers.TaskRefinement((3, NUM_FIELDS, D), num_tasks=2), r"expects fields \(F, D\) or \(2, F, D\)"),
        (lambda: ctr.towers.TaskRefinement((NUM_FIELDS, D), num_tasks=0), "0 tasks"),
        (
            lambda: ctr.embeddings.TaskInterests(6, num_tasks=1, num_behaviours=1, num_heads=4),
            "a multiple of num_heads",
        ),
        (
            lambda: ctr.embeddings.InterestEmbedding(example_schema().features, target="price", num_tasks=2),
            "must be a cat",
        ),
        (
            lambda: ctr.embeddings.InterestEmbedding(example_schema().features, target="user", num_tasks=2),
            "no history shares",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
