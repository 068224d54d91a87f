"""Metrics against brute force over all pairs, against scikit-learn, and on input that must be refused."""

from __future__ import annotations

import ast
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

import ctrlib.metrics
from ctrlib.metrics import (
    StreamingAUC,
    StreamingMetrics,
    auc,
    auc_delong,
    auc_paired_test,
    average_precision,
    calibration,
    calibration_se,
    ece_by_chance,
    evaluate_binary,
    expected_calibration_error,
    gauc,
    log_loss,
    normalized_entropy,
)

few = settings(max_examples=60, deadline=None)


def brute_auc(labels, scores, weights=None):
    weights = [1.0] * len(labels) if weights is None else weights
    won = pairs = 0.0
    for i, j in itertools.product(range(len(labels)), repeat=2):
        if labels[i] == 1 and labels[j] == 0:
            pairs += weights[i] * weights[j]
            won += weights[i] * weights[j] * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return won / pairs if pairs else math.nan


@st.composite
def rows(draw, max_rows=40):
    """Labels, scores with many ties (and both zeros), weights of which some are 0, groups."""
    n = draw(st.integers(1, max_rows))

    def column(values):
        return np.array(draw(st.lists(values, min_size=n, max_size=n)))

    scores = column(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1e-30, 0.25, 0.5, 3.0, 1e30]))
    weights = column(st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0]))
    return column(st.integers(0, 1)), scores, weights, column(st.integers(0, 5))


def planted(num_rows, base_rate, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=num_rows) + math.log(base_rate / (1 - base_rate)) - 0.3
    return (rng.random(num_rows) < 1 / (1 + np.exp(-logits))).astype(np.float32), logits.astype(dtype)


# ----------------------------------------------------------------------------------------------------------------- AUC


@few
@given(rows(), st.sampled_from([np.float32, np.float64]))
def test_auc_is_the_share_of_ordered_pairs(data, dtype):
    labels, scores, weights, _ = data
    scores = scores.astype(dtype)
    assert auc(labels, scores) == pytest.approx(brute_auc(labels, scores), abs=1e-12, nan_ok=True)
    assert auc(labels, scores, weights) == pytest.approx(brute_auc(labels, scores, weights), abs=1e-12, nan_ok=True)
    streaming = StreamingAUC()
    streaming.update(labels, scores, weights)
    assert streaming.compute() == pytest.approx(brute_auc(labels, scores, weights), abs=1e-12, nan_ok=True)


@few
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(-(2.0**126), 2.0**126, width=32)), min_size=2, max_size=60))
def test_auc_equals_sklearn_on_any_float32(pairs):
    labels, scores = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs], dtype=np.float32)
    if 0 < labels.sum() < len(labels):
        assert auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
        assert auc(labels, scores.astype(np.float64)) == auc(labels, scores)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_equals_sklearn_on_many_rows_with_ties(dtype):
    labels, scores = planted(20_000, 0.2, dtype=dtype)
    scores = np.round(scores, 1)
    weights = np.random.default_rng(1).random(len(labels))
    assert auc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    expected = sk.roc_auc_score(labels, scores, sample_weight=weights)
    assert auc(labels, scores, weights) == pytest.approx(expected, abs=1e-12)
    assert auc(labels == 1, scores) == auc(labels, scores) == auc(labels.astype(np.int8), scores)


def test_constant_scores_give_one_half_in_any_order_of_rows():
    labels = np.array([0, 0, 0, 1, 1])
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 7):
        permuted, constant = labels[list(order)], np.full(5, 0.3)
        streaming = StreamingAUC()
        streaming.update(permuted, constant)
        assert auc(permuted, constant) == auc(permuted, constant.astype(np.float32)) == streaming.compute() == 0.5


def test_zeros_of_both_signs_are_one_score():
    labels = [0, 1]
    for scores in ([0.0, -0.0], [-0.0, 0.0]):
        for dtype in (np.float32, np.float64):
            values = np.array(scores, dtype=dtype)
            streaming = StreamingAUC()
            streaming.update(labels, values)
            assert auc(labels, values) == auc(labels, values, [1, 2]) == streaming.compute() == 0.5
            assert gauc(labels, values, [1, 1]).value == average_precision(labels, values) == 0.5
            assert auc_delong([0, 0, 1, 1], np.tile(values, 2)).auc == 0.5


def test_float64_scores_that_float32_cannot_tell_apart_are_not_ties():
    scores = np.array([1.0, np.nextafter(1.0, 2.0)])
    assert len(np.unique(scores.astype(np.float32))) == 1
    assert auc([0, 1], scores) == 1.0
    assert auc([1, 0], scores) == 0.0
    assert gauc([0, 1], scores, [5, 5]).value == 1.0


def test_one_class_only_or_no_rows_is_nan():
    for labels in ([1, 1], [0, 0], []):
        scores = np.arange(len(labels), dtype=np.float64)
        streaming = StreamingAUC()
        streaming.update(labels, scores)
        assert math.isnan(auc(labels, scores)) and math.isnan(auc(labels, scores.astype(np.float32)))
        assert math.isnan(streaming.compute())
        assert math.isnan(auc_delong(labels, scores).standard_error)
        assert math.isnan(auc_paired_test(labels, scores, scores).p_value)
        assert math.isnan(gauc(labels, scores, scores.astype(int)).value)
        assert math.isnan(normalized_entropy(labels, scores))
        evaluate_binary(labels, scores, groups=scores.astype(int))
    assert math.isnan(average_precision([0, 0], [0.1, 0.2])) and average_precision([1, 1], [0.1, 0.2]) == 1.0


# ----------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("base_rate", [0.3, 0.01, 0.0015])
@pytest.mark.parametrize("as_probability", [False, True])
def test_histogram_is_within_5e_6_of_the_exact_auc(base_rate, as_probability):
    labels, scores = planted(1_000_000, base_rate)
    if as_probability:
        scores = 1 / (1 + np.exp(-scores))
    streaming = StreamingAUC()
    streaming.update(labels, scores)
    assert abs(streaming.compute() - auc(labels, scores)) < 5e-6


def test_merging_is_bit_equal_in_any_order():
    labels, logits = planted(3_000, 0.1)
    weights = (np.arange(3_000) % 7 > 0).astype(np.float32)
    parts = []
    for rank in range(4):
        part = StreamingMetrics()
        for start in range(rank * 750, rank * 750 + 750, 250):
            batch = slice(start, start + 250)
            part.update(labels[batch], logits[batch], weights[batch])
        parts.append(part)
    results = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        total = StreamingMetrics()
        for rank in order:
            total.merge(parts[rank])
        results.append(total.compute())
    assert all(result == results[0] for result in results)
    left, right = StreamingMetrics(), StreamingMetrics()
    for total, pair in ((left, (0, 1)), (right, (2, 3))):
        for rank in pair:
            total.merge(parts[rank])
    right.merge(left)
    assert right.compute() == results[0]


def test_streaming_metrics_equal_the_exact_ones():
    labels, logits = planted(5_000, 0.1)
    weights = np.random.default_rng(2).random(5_000).round(1)
    metrics = StreamingMetrics()
    assert math.isnan(metrics.compute()["log_loss"])
    for start in range(0, 5_000, 999):
        batch = slice(start, start + 999)
        metrics.update(labels[batch], logits[batch], weights[batch])
    result, expected = metrics.compute(), evaluate_binary(labels, logits, weights=weights)
    assert result.pop("auc") == pytest.approx(expected["auc"], abs=1e-4)
    assert result == pytest.approx({key: expected[key] for key in result}, rel=1e-12)


def test_state_is_a_copy_and_comes_back_whole():
    labels, logits = planted(500, 0.2)
    metrics, other = StreamingMetrics(), StreamingMetrics()
    metrics.update(labels, logits)
    metrics.update(labels[:99], logits[:99])
    state = metrics.state_dict()
    before = metrics.compute()
    metrics.update(labels, logits)
    other.load_state_dict(state)
    assert other.compute() == before != metrics.compute()
    histogram = StreamingAUC()
    with pytest.raises(ValueError, match=r"must have keys \['counts'\]"):
        histogram.load_state_dict(state)
    with pytest.raises(ValueError, match=r"shape \(2, 262144\), got \(2, 3\)"):
        histogram.load_state_dict({"counts": np.zeros((2, 3))})
    histogram.load_state_dict({"counts": state["counts"]})
    assert histogram.compute() == before["auc"]


def test_scores_beyond_float32_stay_in_order():
    streaming = StreamingAUC()
    streaming.update([0, 1, 0], [-1e300, 1e300, 5.0])
    assert streaming.compute() == 1.0


# -------------------------------------------------------------------------------------------------------------- DeLong


def brute_placements(labels, scores):
    kernel = np.array(
        [
            [(a > b) + 0.5 * (a == b) for b, label in zip(scores, labels) if label == 0]
            for a, label in zip(scores, labels)
            if label == 1
        ]
    )
    return kernel.mean(axis=1), kernel.mean(axis=0)


def test_delong_is_the_covariance_of_brute_force_placements():
    rng = np.random.default_rng(3)
    labels = (rng.random(90) < 0.4).astype(int)
    a = np.round(rng.normal(size=90) + labels, 1)
    b = np.round(a + rng.normal(size=90), 1)
    (a10, a01), (b10, b01) = brute_placements(labels, a), brute_placements(labels, b)
    covariance = np.cov(a10, b10) / len(a10) + np.cov(a01, b01) / len(a01)
    result = auc_delong(labels, a)
    assert result.auc == pytest.approx(auc(labels, a), abs=1e-12)
    assert result.standard_error == pytest.approx(math.sqrt(covariance[0, 0]), rel=1e-10)
    assert result.high - result.low == pytest.approx(2 * 1.959964 * result.standard_error, rel=1e-5)
    test = auc_paired_test(labels, a, b)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert test.difference == pytest.approx(auc(labels, a) - auc(labels, b), abs=1e-12)
    assert test.standard_error == pytest.approx(math.sqrt(variance), rel=1e-10)
    assert test.z == pytest.approx(test.difference / math.sqrt(variance), rel=1e-10)
    assert test.p_value == pytest.approx(math.erfc(abs(test.z) / math.sqrt(2)), rel=1e-12)
    assert auc_paired_test(labels, b, a).z == -test.z


def test_delong_agrees_with_the_bootstrap():
    labels, scores = planted(1_500, 0.2)
    rng = np.random.default_rng(4)
    resampled = [auc(labels[rows], scores[rows]) for rows in (rng.integers(0, 1_500, 1_500) for _ in range(400))]
    assert auc_delong(labels, scores).standard_error == pytest.approx(float(np.std(resampled)), rel=0.12)


def test_delong_at_the_edges():
    perfect = auc_delong([0, 0, 1, 1], [1, 2, 3, 4])
    assert (perfect.auc, perfect.standard_error, perfect.low, perfect.high) == (1.0, 0.0, 1.0, 1.0)
    same = auc_paired_test([0, 0, 1, 1], [1, 3, 2, 4], [1, 3, 2, 4])
    assert (same.difference, same.z, same.p_value) == (0.0, 0.0, 1.0)
    sure = auc_paired_test([0, 0, 1, 1], [1, 2, 3, 4], [4, 3, 2, 1])
    assert (sure.difference, sure.z, sure.p_value) == (1.0, math.inf, 0.0)
    single = auc_delong([0, 0, 1], [1, 2, 3])
    assert single.auc == 1.0 and math.isnan(single.standard_error)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 95"):
        auc_delong([0, 1], [0.0, 1.0], confidence=95)


# ---------------------------------------------------------------------------------------------------------------- GAUC


def test_gauc_golden():
    labels, scores = [1, 0, 0, 1, 1, 1, 0], [0.9, 0.8, 0.95, 0.4, 0.3, 0.7, 0.2]
    for groups in (["u1"] * 3 + ["u2"] * 2 + ["u3"] * 2, [9, 9, 9, 4, 4, -1, -1]):
        result = gauc(labels, scores, groups)
        assert result.value == pytest.approx(0.7, abs=1e-15)  # (3 x 0.5 + 2 x 1) / 5
        assert (result.groups_used, result.groups_dropped, result.rows_dropped) == (2, 1, 2)


@few
@given(rows(), st.sampled_from([np.float32, np.float64]), st.booleans())
def test_gauc_is_the_weighted_mean_over_groups(data, dtype, weighted):
    labels, scores, weights, groups = data
    scores = scores.astype(dtype)
    weights = weights if weighted else np.ones(len(labels))
    total = mass = 0.0
    used = dropped = rows_dropped = 0
    for group in np.unique(groups[weights > 0]):
        mine = (groups == group) & (weights > 0)
        value = brute_auc(labels[mine], scores[mine], weights[mine])
        if math.isnan(value):
            dropped, rows_dropped = dropped + 1, rows_dropped + int(mine.sum())
        else:
            used, total, mass = used + 1, total + value * weights[mine].sum(), mass + weights[mine].sum()
    result = gauc(labels, scores, groups, weights if weighted else None)
    assert result.value == pytest.approx(total / mass if mass else math.nan, abs=1e-12, nan_ok=True)
    assert (result.groups_used, result.groups_dropped, result.rows_dropped) == (used, dropped, rows_dropped)


def test_gauc_refuses_missing_groups():
    with pytest.raises(ValueError, match="not be nan, got 1 other values of 2, the first nan at index 1"):
        gauc([0, 1], [0.1, 0.2], [1.0, math.nan])
    with pytest.raises(ValueError, match="of one type"):
        gauc([0, 1], [0.1, 0.2], np.array(["a", None], dtype=object))


# ------------------------------------------------------------------------------------------------------- probabilities


@few
@given(rows())
def test_average_precision_equals_sklearn(data):
    labels, scores, weights, _ = data
    if labels.sum():
        assert average_precision(labels, scores) == pytest.approx(sk.average_precision_score(labels, scores), abs=1e-12)
    if (labels * weights).sum():
        expected = sk.average_precision_score(labels, scores, sample_weight=weights)
        assert average_precision(labels, scores, weights) == pytest.approx(expected, abs=1e-12)


def test_log_loss_equals_sklearn_and_survives_extreme_logits():
    labels, logits = planted(2_000, 0.3, dtype=np.float64)
    weights = np.random.default_rng(5).random(2_000)
    p = 1 / (1 + np.exp(-logits))
    assert log_loss(labels, logits) == pytest.approx(sk.log_loss(labels, p), rel=1e-12)
    assert log_loss(labels, logits, weights) == pytest.approx(sk.log_loss(labels, p, sample_weight=weights), rel=1e-12)
    assert log_loss([1, 0], [-1000.0, 1000.0]) == 1000.0
    assert log_loss([1], [50.0]) == pytest.approx(math.exp(-50), rel=1e-12)
    report = evaluate_binary([1, 0], [-1000.0, 1000.0])
    assert report["auc"] == 0.0 and report["calibration"] == 1.0


def test_normalized_entropy_is_one_for_the_base_rate():
    labels = np.array([1, 0, 0, 0, 0])
    assert normalized_entropy(labels, np.full(5, math.log(0.2 / 0.8))) == pytest.approx(1.0, rel=1e-12)
    weights = np.array([4.0, 1, 1, 1, 1])
    assert normalized_entropy(labels, np.zeros(5), weights) == pytest.approx(1.0, rel=1e-12)


def test_calibration_and_its_error():
    labels, p = np.array([1, 0, 1, 0]), np.array([0.9, 0.3, 0.6, 0.4])
    assert calibration(labels, p) == pytest.approx(1.1)
    assert calibration(labels, p, [1, 1, 1, 0]) == pytest.approx(0.9)
    assert math.isnan(calibration([0, 0], [0.1, 0.1]))
    assert expected_calibration_error(labels, p, num_bins=1) == pytest.approx(0.05)
    assert expected_calibration_error(labels, p, num_bins=2) == pytest.approx((0.7 + 0.5) / 4)
    assert expected_calibration_error(labels, p, num_bins=99) == pytest.approx((0.1 + 0.3 + 0.4 + 0.4) / 4)
    repeated = expected_calibration_error(np.repeat(labels, 3), np.repeat(p, 3), num_bins=2)
    assert repeated == pytest.approx(expected_calibration_error(labels, p, np.full(4, 3.0), num_bins=2))
    with pytest.raises(ValueError, match="num_bins must be at least 1, got 0"):
        expected_calibration_error(labels, p, num_bins=0)


def test_calibration_error_sees_small_probabilities_and_the_noise_floor_is_as_documented():
    labels, logits = planted(200_000, 0.01, dtype=np.float64)
    p = 1 / (1 + np.exp(-logits))
    rate = labels.mean()
    floor = math.sqrt(2 * rate * (1 - rate) * 20 / (math.pi * len(p)))
    assert 0.3 * floor < expected_calibration_error(labels, p) < 2 * floor
    # squeezing towards the mean keeps the sums equal, and is seen although every probability is below a tenth
    assert expected_calibration_error(labels, np.full_like(p, rate) * 0.5 + p * 0.5) > 3 * floor


def test_evaluate_binary_has_every_metric():
    labels, logits = planted(2_000, 0.2)
    groups = np.arange(2_000) % 100
    report = evaluate_binary(labels, logits, groups=groups)
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    assert report["auc"] == auc(labels, logits)
    assert report["auc_se"] == auc_delong(labels, logits).standard_error
    assert report["log_loss"] == log_loss(labels, logits)
    assert report["normalized_entropy"] == normalized_entropy(labels, logits)
    assert report["calibration"] == pytest.approx(calibration(labels, p), rel=1e-12)
    assert report["ece"] == pytest.approx(expected_calibration_error(labels, p), rel=1e-9)
    assert report["calibration_se"] == pytest.approx(calibration_se(labels, p), rel=1e-9)
    assert report["ece_by_chance"] == pytest.approx(ece_by_chance(labels, p), rel=1e-9)
    assert report["pr_auc"] == average_precision(labels, logits)
    assert report["gauc"] == gauc(labels, logits, groups).value
    assert (report["rows"], report["positives"]) == (2_000, labels.sum())
    assert all(type(value) is float for value in report.values())
    assert "gauc" not in evaluate_binary(labels, logits)
    assert math.isnan(evaluate_binary(labels, logits, weights=np.linspace(0, 1, 2_000))["auc_se"])
    # padding changes nothing, whatever it holds
    pad = [np.concatenate([array, [np.nan, np.nan]]) for array in (labels, logits)]
    padded = evaluate_binary(*pad, groups=np.r_[groups, 0, 999], weights=np.r_[np.ones(2_000), 0, 0])
    assert padded == pytest.approx(report, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("labels", "scores", "weights", "message"),
    [
        ([0, 1], [0.1, math.nan], None, "scores must be finite, got 1 other values of 2, the first nan at index 1"),
        ([0, 1], [math.inf, 0.1], None, "the first inf at index 0"),
        ([0, 2, -1], [0.1, 0.2, 0.3], None, "labels must be 0 or 1, got 2 other values of 3, the first 2 at index 1"),
        ([0, math.nan], [0.1, 0.2], None, "first nan at index 1: drop rows without a label, or give them weight 0"),
        ([0, 1, 1], [0.1, 0.2], None, "scores must have one value per label, got 2 for 3 labels"),
        ([0, 1], [0.1, 0.2], [1.0], "weights must have one value per label, got 1 for 2"),
        ([0, 1], [[0.1], [0.2]], None, r"scores must be one-dimensional \(B,\), got shape \(2, 1\).*scores\[:, 0\]"),
        (1, 0.1, None, r"labels must be one-dimensional \(B,\), got shape \(\)"),
        ([0, 1], [0.1, 0.2], [1.0, -1.0], "weights must be finite and >= 0, got 1 other.*-1.0 at index 1"),
        ([0, 1], [0.1, 0.2], [1.0, math.nan], "weights must be finite"),
        (["0", "1"], [0.1, 0.2], None, "labels must be 0 or 1, got dtype <U1"),
        ([0, 1], ["a", "b"], None, "scores must be numbers, got dtype <U1"),
    ],
)
def test_bad_input_is_refused(labels, scores, weights, message):
    for metric in (auc, average_precision, StreamingAUC().update):
        with pytest.raises(ValueError, match=message):
            metric(labels, scores, weights)
    for metric in (log_loss, normalized_entropy, StreamingMetrics().update):
        with pytest.raises(ValueError, match=message.replace("scores", "logits")):
            metric(labels, scores, weights)


def test_probabilities_outside_0_1_are_refused():
    for metric in (calibration, expected_calibration_error):
        with pytest.raises(ValueError, match=r"within \[0, 1\], got 1 other.*-0.5 at index 0: pass the sigmoid"):
            metric([0, 1], [-0.5, 0.5])


def test_small_types_are_accepted():
    labels = np.array([0, 1, 1, 0], dtype=np.uint8)
    for dtype in (np.float16, np.int32, np.uint8, np.bool_):
        assert auc(labels, np.array([0, 1, 1, 1], dtype=dtype)) == 0.75


def test_metrics_import_numpy_only():
    files = sorted(Path(ctrlib.metrics.__file__).parent.glob("*.py"))
    assert len(files) == 7
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    modules = {name for name in modules if not name.startswith("ctrlib.metrics.")}
    modules.discard("ctrlib.errors")  # which imports nothing but of Python's own
    assert modules <= {"__future__", "collections.abc", "itertools", "math", "dataclasses", "statistics", "typing"} | {
        "numpy",
        "numpy.typing",
    }
