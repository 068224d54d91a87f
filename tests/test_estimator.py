"""`ctr.CTRClassifier`: scikit-learn's own checks, and where it is used: scores, pipelines, searches, files."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OrdinalEncoder, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import ctrlib as ctr
from ctrlib import cli

EXPECTED_FAILED_CHECKS = {
    "check_sample_weight_equivalence_on_dense_data": (
        "the rows held out as validation are drawn row by row, and batches hold so many rows: two rows of weight 1 may "
        "go where one of weight 2 cannot"
    ),
}
# Tiny: the checks fit some 80 times.
SMALL = {
    "hidden": [16],
    "numeric": "vector",
    "training": {"batch_size": 32, "learning_rate": 0.02, "embedding_l2": 1e-3, "patience": 8},
}


def classifier(**arguments: Any) -> ctr.CTRClassifier:
    return ctr.CTRClassifier(**{"model": "mlp", "max_epochs": 8, "config": SMALL, **arguments})


@parametrize_with_checks([classifier()], expected_failed_checks=lambda _: EXPECTED_FAILED_CHECKS)
@pytest.mark.filterwarnings("ignore")  # the checks warn on purpose
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def clicks(rows: int = 600, seed: int = 3) -> tuple[pl.DataFrame, np.ndarray]:
    """Rows whose best AUC is known: the logit is that of the shop, plus the price."""
    generator = np.random.default_rng(seed)
    shop, price = generator.integers(6, size=rows), generator.normal(size=rows)
    logit = 3.0 * (shop % 2) - 1.5 + price
    frame = pl.DataFrame({"shop": [f"s{one}" for one in shop], "price": price, "size": generator.normal(size=rows)})
    return frame, np.where(generator.random(rows) < 1 / (1 + np.exp(-logit)), "bought", "left")


FRAME, BOUGHT = clicks()


@pytest.fixture(scope="module")
def fitted() -> ctr.CTRClassifier:
    return classifier().fit(FRAME, BOUGHT)


def test_it_learns_what_is_to_be_learnt_and_names_the_classes(fitted: ctr.CTRClassifier) -> None:
    frame, bought = clicks(2000, seed=4)
    found = fitted.predict_proba(frame)
    assert fitted.classes_.tolist() == ["bought", "left"]
    assert np.abs(found.sum(axis=1) - 1).max() < 1e-15
    logit = 3.0 * (frame["shop"].str.slice(1).cast(pl.Int64) % 2) - 1.5 + frame["price"]
    best = ctr.metrics.auc(bought == "bought", logit)
    assert best > 0.8
    assert ctr.metrics.auc(bought == "bought", found[:, 0]) > best - 0.02
    assert (fitted.predict(frame) == np.where(found[:, 1] > 0.5, "left", "bought")).all()
    assert fitted.score(frame, bought) == np.mean(fitted.predict(frame) == bought) > 0.7


def test_what_it_says_after_fit(fitted: ctr.CTRClassifier) -> None:
    assert fitted.n_features_in_ == 3 and fitted.feature_names_in_.tolist() == ["shop", "price", "size"]
    assert [type(feature).__name__ for feature in fitted.schema_.features] == ["Categorical", "Numeric", "Numeric"]
    assert fitted.config_["model"] == "mlp" and fitted.config_["training"]["max_epochs"] == 8
    assert fitted.config_["embedding_dim"] == 8  # by the data: few values a field
    assert fitted.result_["valid_auc"] > 0.75
    assert not any("test" in name for name in fitted.result_)


def test_pandas_polars_and_any_two_classes_are_alike() -> None:
    found = [
        classifier().fit(frame, y).predict_proba(frame)[:, 1]
        for frame, y in (
            (FRAME, BOUGHT == "left"),
            (FRAME.to_pandas(), pd.Series(BOUGHT, name="label")),
            (FRAME, pl.Series("price", BOUGHT)),
            (FRAME, np.where(BOUGHT == "left", 7, -1)),
        )
    ]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def test_columns_of_arrays_are_numbers_unless_said_otherwise() -> None:
    shop = FRAME["shop"].str.slice(1).cast(pl.Int64).to_numpy()
    rows = np.stack([shop, FRAME["price"].to_numpy()], axis=1)
    plain = classifier().fit(rows, BOUGHT)
    said = classifier(categorical=["x0"]).fit(rows, BOUGHT)
    numbered = classifier().fit(pd.DataFrame(rows), BOUGHT)
    assert [type(feature).__name__ for feature in plain.schema_.features] == ["Numeric", "Numeric"]
    assert [type(feature).__name__ for feature in said.schema_.features] == ["Categorical", "Numeric"]
    assert said.schema_["x0"].num_embeddings == 6 + 3
    assert said.result_["valid_auc"] > plain.result_["valid_auc"] + 0.05  # even and odd is no matter of size
    np.testing.assert_array_equal(plain.predict_proba(rows), numbered.predict_proba(rows))


def test_kinds_are_as_on_the_command_line() -> None:
    frame = FRAME.with_columns(seen=pl.Series(["a|b", "b", "c|a|b"] * 200), price=pl.col("price").exp())
    found = classifier(numeric=["price:log"], categorical=["shop"], sequence=["seen"]).fit(frame, BOUGHT)
    assert found.schema_["price"].transform == "log"
    assert type(found.schema_["seen"]).__name__ == "Sequence" and found.schema_["seen"].num_embeddings == 3 + 3


def test_missing_and_unseen_cells_score() -> None:
    fitted = classifier().fit(FRAME, BOUGHT)
    rows = pl.DataFrame({"shop": ["s1", None, "new"], "price": [None, 0.5, 0.5], "size": [0.0, 0.0, 0.0]})
    found = fitted.predict_proba(rows)[:, 1]
    assert np.isfinite(found).all() and len(set(found)) == 3
    np.testing.assert_array_equal(found, fitted.predict_proba(rows.to_pandas())[:, 1])


def test_weights_count_and_none_is_no_row() -> None:
    heavy = np.where(BOUGHT == "left", 4.0, 1.0)
    plain, weighted = classifier().fit(FRAME, BOUGHT), classifier().fit(FRAME, BOUGHT, heavy)
    more = [one.predict_proba(FRAME)[:, 1].mean() for one in (plain, weighted)]
    share = np.mean(BOUGHT == "left")
    assert abs(more[0] - share) < 0.05
    assert abs(more[1] - 4 * share / (1 + 3 * share)) < 0.12  # it is regularised
    kept = np.arange(600) < 400
    np.testing.assert_array_equal(
        classifier().fit(FRAME, BOUGHT, kept.astype(float)).predict_proba(FRAME),
        classifier().fit(FRAME[:400], BOUGHT[:400], np.ones(400)).predict_proba(FRAME),
    )


def test_validation_has_its_share_of_each_class() -> None:
    classes = np.array([0] * 570 + [1] * 30)
    found = ctr.CTRClassifier(validation_fraction=0.2)
    found.classes_ = np.array([0, 1])
    held_out = found._held_out(classes, np.random.default_rng(1))
    assert held_out[classes == 0].sum() == 114 and held_out[classes == 1].sum() == 6
    few = found._held_out(np.array([0, 0, 1, 1, 1]), np.random.default_rng(1))
    assert few[:2].sum() == 1 and few[2:].sum() == 1


def test_the_same_number_gives_the_same_bits_and_nobody_elses_random_numbers_change() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, second, other = (classifier(random_state=seed).fit(FRAME, BOUGHT) for seed in (1, np.int64(1), 2))
    assert torch.equal(torch.rand(2), expected)
    np.testing.assert_array_equal(first.predict_proba(FRAME), second.predict_proba(FRAME))
    assert np.abs(first.predict_proba(FRAME) - other.predict_proba(FRAME)).max() > 1e-3
    drawn = classifier(random_state=np.random.RandomState(0)).fit(FRAME, BOUGHT)
    assert drawn.config_["training"]["seed"] == np.random.RandomState(0).randint(2**31)


# Where it is used.


def test_cross_validation_by_auc() -> None:
    scores = cross_val_score(classifier(), FRAME.to_pandas(), BOUGHT, cv=3, scoring="roc_auc")
    assert scores.shape == (3,) and scores.min() > 0.75
    accuracies = cross_val_score(classifier(), FRAME, BOUGHT, cv=2)
    assert accuracies.min() > 0.65


def test_pipeline_behind_a_column_transformer() -> None:
    columns = ColumnTransformer(
        [("ids", OrdinalEncoder(), ["shop"]), ("numbers", StandardScaler(), ["price"])], verbose_feature_names_out=False
    ).set_output(transform="pandas")
    pipeline = make_pipeline(columns, classifier(categorical=["shop"]))
    frame = FRAME.to_pandas()
    pipeline.fit(frame, BOUGHT)
    assert pipeline[-1].feature_names_in_.tolist() == ["shop", "price"]
    assert [type(feature).__name__ for feature in pipeline[-1].schema_.features] == ["Categorical", "Numeric"]
    assert ctr.metrics.auc(BOUGHT == "left", pipeline.predict_proba(frame)[:, 1]) > 0.8
    assert cross_val_score(pipeline, frame, BOUGHT, cv=2, scoring="roc_auc").min() > 0.75


def test_search_over_models() -> None:
    search = GridSearchCV(classifier(), {"model": ["mlp", "deepfm"]}, cv=2, scoring="roc_auc").fit(FRAME, BOUGHT)
    assert search.cv_results_["mean_test_score"].min() > 0.75
    assert search.best_estimator_.config_["model"] == search.best_params_["model"]


def test_a_clone_has_the_parameters_and_nothing_learnt(fitted: ctr.CTRClassifier) -> None:
    again = clone(fitted)
    assert again.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        again.predict(FRAME)
    np.testing.assert_array_equal(again.fit(FRAME, BOUGHT).predict_proba(FRAME), fitted.predict_proba(FRAME))


IN_A_NEW_PROCESS = """
import sys, joblib, numpy as np, polars as pl, ctrlib as ctr
saved, pickled, rows, out = sys.argv[1:]
rows = pl.read_parquet(rows)
for number, found in enumerate((ctr.CTRClassifier.load(saved), joblib.load(pickled))):
    np.save(f"{out}-{number}.npy", found.predict_proba(rows))
    assert found.predict(rows)[0] in ("bought", "left")
"""


def test_in_a_new_process_the_probabilities_are_equal_bit_for_bit(tmp_path: Path, fitted: ctr.CTRClassifier) -> None:
    saved, pickled, rows, out = (tmp_path / name for name in ("saved", "pickled", "rows.parquet", "out"))
    FRAME.write_parquet(rows)
    fitted.save(saved)
    joblib.dump(fitted, pickled)
    command = [sys.executable, "-c", IN_A_NEW_PROCESS, saved, pickled, rows, out]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(ctr.__file__).parent.parent)})
    for number in range(2):
        np.testing.assert_array_equal(np.load(f"{out}-{number}.npy"), fitted.predict_proba(FRAME))


def test_a_saved_one_is_a_model_folder_without_pickle(tmp_path: Path, fitted: ctr.CTRClassifier) -> None:
    folder, out = tmp_path / "model", tmp_path / "scores.csv"
    FRAME.write_csv(tmp_path / "rows.csv")
    fitted.save(folder)
    files = {path.name for path in folder.iterdir()}
    assert files >= {"model.json", "model.safetensors", "schema.json", "vocab", "MANIFEST", "classifier.json"}
    assert not [path for path in folder.rglob("*") if path.suffix in (".pkl", ".pt", ".pickle", ".joblib")]
    assert cli.main(["predict", str(folder), str(tmp_path / "rows.csv"), "--out", str(out)]) == 0
    np.testing.assert_allclose(pl.read_csv(out)["label"], fitted.predict_proba(FRAME)[:, 1], rtol=1e-12)
    found = ctr.CTRClassifier.load(folder)
    assert found.get_params() == {**fitted.get_params(), "numeric": [], "categorical": [], "sequence": []}
    assert found.config_ == fitted.config_
    assert found.result_ == fitted.result_ and found.schema_ == fitted.schema_
    with pytest.raises(ctr.CtrlibError, match="already"):
        fitted.save(folder)
    for path in sorted(folder.rglob("*"), reverse=True):  # it needs the folder no more
        path.unlink() if path.is_file() else path.rmdir()
    np.testing.assert_array_equal(found.predict_proba(FRAME), fitted.predict_proba(FRAME))
    found.save(folder)
    assert ctr.CTRClassifier.load(folder).classes_.tolist() == ["bought", "left"]


@pytest.mark.parametrize("classes", [[False, True], [-1.0, 2.0], np.array([3, 4], np.int16), ["a", "bc"]])
def test_classes_come_back_as_they_were(classes: Any, tmp_path: Path) -> None:
    y = np.array(classes)[(BOUGHT == "left").astype(int)]
    fitted = classifier(max_epochs=1).fit(FRAME, y)
    fitted.save(tmp_path / "model")
    found = ctr.CTRClassifier.load(tmp_path / "model").predict(FRAME)
    assert found.dtype == y.dtype
    np.testing.assert_array_equal(found, fitted.predict(FRAME))


def test_a_pickled_one_is_bytes_and_leaves_no_folder(fitted: ctr.CTRClassifier) -> None:
    found = pickle.loads(pickle.dumps(fitted))
    folder = found._fitted.folder
    np.testing.assert_array_equal(found.predict_proba(FRAME), fitted.predict_proba(FRAME))
    assert folder.is_dir() and folder != fitted._fitted.folder
    del found
    assert not folder.exists()


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": "mpl"}, "unknown model 'mpl'; the closest are"),
        ({"numeric": "price"}, r"numeric='price': expected a list of names of columns, such as \['price'\]"),
        ({"categorical": ["shopp"]}, "categorical names 'shopp', which is no column of X: the closest are shop"),
        ({"categorical": ["shop"], "sequence": ["shop"]}, "sequence names 'shop', of which something else is said"),
        ({"validation_fraction": 1}, "validation_fraction"),
        ({"config": {"hiden": [4]}}, r"mlp takes no \['hiden'\]; the closest are hidden"),
        ({"config": {"training": {"max_epochs": 3}}}, "config says max_epochs=3, and max_epochs=8: say it once"),
        ({"config": {"training": {"seed": 3}}}, "config says seed=3: say it as random_state"),
        ({"config": {"model": "fm"}}, "the settings name a model, 'fm', beside 'mlp'"),
        ({"random_state": -1}, "random_state"),
        ({"numeric": ["shop"]}, "shop"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ctr.CtrlibError, match=said):
        classifier(**arguments).fit(FRAME, BOUGHT)


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.array(["a", "b", "c"] * 200), "Only binary classification is supported"),
        (np.array(["a"] * 600), "class 'a' has 600 of n_samples=600 rows .* 1 classes: expected two classes"),
        (np.array(["a"] * 599 + ["b"]), "class 'b' has 1 of n_samples=600"),
        (np.array([0, 1] * 299), "inconsistent numbers of samples"),
    ],
)
def test_labels_that_do_not_fit_are_refused(y: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        classifier().fit(FRAME, y)


def test_text_in_an_array_and_other_columns_are_refused(fitted: ctr.CTRClassifier) -> None:
    with pytest.raises(ctr.CtrlibError, match="ids as text need a frame whose columns have names"):
        classifier().fit(FRAME.to_numpy(), BOUGHT)
    with pytest.raises(ValueError, match="feature names"):
        fitted.predict(FRAME.rename({"shop": "store"}))
    with pytest.raises(ValueError, match="holds inf"):
        fitted.predict(FRAME.with_columns(price=pl.lit(np.inf)))
    with pytest.raises(ValueError, match=r"0 sample\(s\)"):
        fitted.predict(FRAME[:0])


def test_what_json_does_not_hold_is_not_saved(tmp_path: Path) -> None:
    fitted = classifier(max_epochs=1, random_state=np.random.RandomState(1)).fit(FRAME, BOUGHT)
    with pytest.raises(ctr.CtrlibError, match=r"is not plain data .* give a whole number as random_state"):
        fitted.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_folders_that_are_none_or_damaged_are_refused(tmp_path: Path, fitted: ctr.CTRClassifier) -> None:
    with pytest.raises(ctr.SchemaError, match=r"has no classifier.json, so CTRClassifier.save did not write it"):
        ctr.CTRClassifier.load(tmp_path)
    fitted.save(tmp_path / "model")
    path = tmp_path / "model" / "classifier.json"
    said = json.loads(path.read_text())
    for content in ("{", json.dumps({**said, "parameters": {"modell": "mlp"}}), "[]", json.dumps({"parameters": {}})):
        path.write_text(content)
        with pytest.raises(ctr.SchemaError, match=r"classifier.json is damaged"):
            ctr.CTRClassifier.load(tmp_path / "model")
    path.write_text(json.dumps(said))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ctr.SchemaError, match=r"model\.safetensors"):
        ctr.CTRClassifier.load(tmp_path / "model")
