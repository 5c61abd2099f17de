"""Bundles on disk, and the one predictor: whole or refused, self-contained, equal to the last bit in any company."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import made as making
import msgspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raylway import storage
from raylway.bundle import artefact, contents, examples
from raylway.bundle.predictor import CHUNK_ROWS, NotFinite, Predictor
from raylway.bundle.rows import RowReader
from raylway.errors import RunFailed, UserError
from raylway.models import registry
from serve_app import forms, openapi, tensors


@pytest.fixture(scope="module")
def fruit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.fruit().stage(tmp_path_factory.mktemp("fruit") / "bundle")


@pytest.fixture(scope="module")
def price(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.price().stage(tmp_path_factory.mktemp("price") / "bundle")


@pytest.fixture(scope="module")
def article(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.article().stage(tmp_path_factory.mktemp("article") / "bundle")


def fruit_rows(count: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "length": rng.uniform(0, 20, count),
            "width": rng.uniform(0, 5, count),
            "colour": rng.choice(["green", "red", "blue", "NA"], count),
        }
    )


def test_the_answers_are_those_of_plain_torch(fruit: Path) -> None:
    made, table = making.fruit(), fruit_rows(50)
    encoded = made.transform.encode(table)
    with torch.inference_mode():
        logits = made.model(torch.from_numpy(encoded.numeric), torch.from_numpy(encoded.categorical).long())
    answers = Predictor(fruit).predict(table)
    np.testing.assert_allclose(answers.probabilities, logits.softmax(1).numpy(), rtol=1e-5, atol=1e-7)
    assert answers.labels == [made.signature.classes[code] for code in logits.argmax(1)]
    assert answers.probabilities is not None
    assert answers.probabilities.dtype == np.float32


def test_regression_answers_in_the_unit_of_the_target(price: Path) -> None:
    table = pa.table({"size": [50.0, 100.0, 150.0], "rooms": [2, 3, 4], "place": ["NA", "EU", "NA"]})
    answers = Predictor(price).predict(table)
    assert answers.labels is None
    assert answers.values is not None
    assert answers.values.dtype == np.float64
    np.testing.assert_allclose(answers.values, [50_000, 150_000, 150_000], rtol=0.1)


def test_optional_inputs_are_filled_as_in_training(price: Path) -> None:
    made, predictor = making.price(), Predictor(price)
    rooms, place = made.transform.numeric[1], made.transform.categorical[0]
    _, sparse, _ = RowReader(made.signature).read(b'{"rows":[{"size":50},{"size":50,"rooms":null,"place":null}]}')
    full = msgspec.json.encode({"rows": [{"size": 50, "rooms": rooms.mean, "place": place.most_frequent}]})
    expected = predictor.outputs(RowReader(made.signature).read(full)[1])
    assert predictor.outputs(sparse).tolist() == [expected[0], expected[0]]


@pytest.mark.parametrize("which", ["article", "fruit", "price"])
def test_an_answer_does_not_depend_on_its_batch(which: str, request: pytest.FixtureRequest) -> None:
    predictor = Predictor(request.getfixturevalue(which))
    transform = predictor.bundle.record.transform
    rng = np.random.default_rng(3)
    numeric = rng.standard_normal((3 * CHUNK_ROWS + 5, transform.num_numeric), np.float32)
    shape = (len(numeric), len(transform.category_counts))
    categorical = rng.integers(0, 3, shape)
    together = predictor.forward(numeric, categorical)
    for row in range(len(numeric)):
        alone = predictor.forward(numeric[row : row + 1], categorical[row : row + 1])
        assert alone.tobytes() == together[row : row + 1].tobytes()
    for start in range(1, CHUNK_ROWS + 1):
        rest = predictor.forward(numeric[start:], categorical[start:])
        assert rest.tobytes() == together[start:].tobytes()
    assert predictor.treats_rows_alike()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 199), min_size=1, max_size=70), st.integers(1, 4))
def test_any_batch_of_any_rows_on_any_threads(article: Path, chosen: list[int], threads: int) -> None:
    predictor = _article(article)
    rows = np.random.default_rng(1).standard_normal((200, 1000), np.float32)
    none = np.zeros((len(chosen), 0), np.int32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        outputs = predictor.forward(rows[chosen], none)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    place = len(chosen) // 2
    alone = predictor.forward(rows[chosen[place : place + 1]], none[:1])
    assert outputs[place : place + 1].tobytes() == alone.tobytes()


_PREDICTORS: dict[Path, Predictor] = {}


def _article(folder: Path) -> Predictor:
    return _PREDICTORS.setdefault(folder, Predictor(folder))


def test_json_rows_and_tables_get_the_same_bits(fruit: Path) -> None:
    predictor, table = Predictor(fruit), fruit_rows(40)
    _, rows, _ = RowReader(predictor.signature).read(msgspec.json.encode({"rows": table.to_pylist()}))
    by_table = predictor.predict(table).probabilities
    assert by_table is not None
    assert predictor.outputs(rows).tobytes() == by_table.tobytes()


def test_derived_features_are_computed_from_json_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    table = pa.table({"a": rng.uniform(1, 9, 100), "b": rng.uniform(1, 9, 100), "c": rng.choice(["x", "y"], 100)})
    table = table.append_column("big", pa.array(np.where(table["a"].to_numpy() > table["b"].to_numpy(), "yes", "no")))
    inputs = {"a": "number", "b": "number", "c": "category"}
    predictor = Predictor(making.made(table, "big", inputs, derive={"ratio": "a / b"}).stage(tmp_path / "bundle"))
    _, rows, _ = RowReader(predictor.signature).read(b'{"rows":[{"a":9,"b":1,"c":"x"},{"a":1,"b":9,"c":"x"}]}')
    assert predictor.answers(predictor.outputs(rows)).labels == ["yes", "no"]
    expected = predictor.predict(pa.table({"a": [9.0, 1.0], "b": [1.0, 9.0], "c": ["x", "x"]})).probabilities
    assert predictor.outputs(rows).tobytes() == expected.tobytes()  # type: ignore[union-attr]


def test_no_rows(fruit: Path, price: Path) -> None:
    answers = Predictor(fruit).predict(fruit_rows(0))
    assert (answers.labels, answers.probabilities.shape) == ([], (0, 2))  # type: ignore[union-attr]
    assert Predictor(price).forward(np.zeros((0, 2), np.float32), np.zeros((0, 1), np.int32)).shape == (0,)


def test_the_first_of_equally_probable_classes(fruit: Path) -> None:
    assert Predictor(fruit).answers(np.full((2, 2), 0.5, np.float32)).labels == ["no", "no"]


def test_an_answer_that_is_not_finite_is_never_given(fruit: Path) -> None:
    predictor = Predictor(fruit)
    with pytest.raises(NotFinite, match="not a finite number"):
        predictor.answers(np.array([[0.5, np.nan]], np.float32))
    made = making.fruit()
    with torch.no_grad():
        next(made.model.parameters()).fill_(float("nan"))
    with pytest.raises(NotFinite):
        made.stage(fruit.with_name("broken"))
    assert not fruit.with_name("broken").exists()


def test_wild_but_finite_rows_get_finite_answers(fruit: Path, price: Path) -> None:
    wild = pa.table({"length": [1e308, -1e308], "width": [5e-324, 0.0], "colour": ["x" * 10_000, ""]})
    assert np.isfinite(Predictor(fruit).predict(wild).probabilities).all()
    assert np.isfinite(
        Predictor(price).predict(pa.table({"size": [1e308], "rooms": [1], "place": ["EU"]})).values
    ).all()


def test_a_table_that_lacks_a_column_or_holds_another_type(fruit: Path) -> None:
    predictor, table = Predictor(fruit), fruit_rows(3)
    with pytest.raises(UserError, match="there is no column width"):
        predictor.predict(table.drop(["width"]))
    with pytest.raises(UserError, match="the column width does not hold numbers"):
        predictor.predict(table.set_column(1, "width", pa.array(["1", "2", "3"])))


def test_rows_that_can_not_be_answered_are_named(fruit: Path) -> None:
    table = pa.table(
        {
            "length": [1.0, None, float("inf"), float("nan"), 1.0],
            "width": [1.0, 1.0, 1.0, 1.0, 1.0],
            "colour": ["red", "red", "red", "red", None],
        }
    )
    predictor = Predictor(fruit)
    empty, infinite = "length is empty", "length is not finite"
    assert predictor.unanswerable(table) == [None, empty, infinite, empty, "colour is empty"]
    with pytest.raises(UserError, match=r"row 2: length is empty"):
        predictor.predict(table)
    assert predictor.predict(table.slice(0, 1)).labels is not None


def test_published_with_its_metrics_and_the_same_version(tmp_path: Path) -> None:
    staged = making.fruit().stage(tmp_path / "bundle.staged")
    before = artefact.load(staged).record
    assert before.metrics == {}
    artefact.publish(staged, tmp_path / "bundle", {"accuracy": 0.5, "roc_auc": None})
    after = artefact.load(tmp_path / "bundle").record
    assert after.metrics == {"accuracy": 0.5, "roc_auc": None}
    assert after.version == before.version
    assert after.provenance.run == making.RUN.id
    assert not staged.exists()
    artefact.publish(staged, tmp_path / "bundle", {})  # again, as after a kill between the rename and the run record
    assert artefact.load(tmp_path / "bundle").record.metrics == {"accuracy": 0.5, "roc_auc": None}
    making.fruit().stage(staged)
    artefact.publish(staged, tmp_path / "bundle", {"accuracy": 0.75})
    assert artefact.load(tmp_path / "bundle").record.metrics == {"accuracy": 0.75}


def test_the_version_follows_from_what_decides_the_answers(tmp_path: Path) -> None:
    first = artefact.load(making.fruit().stage(tmp_path / "a", name="one")).record
    again = artefact.load(making.fruit().stage(tmp_path / "b", name="two")).record
    assert (first.version, first.name, again.name) == (again.version, "one", "two")
    other = making.fruit()
    with torch.no_grad():
        next(other.model.parameters()).mul_(1.001)
    assert artefact.load(other.stage(tmp_path / "c")).record.version != first.version


def test_publishing_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no whole bundle"):
        artefact.publish(tmp_path / "bundle.staged", tmp_path / "bundle", {})


@pytest.fixture
def copied(fruit: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fruit, tmp_path / "bundle"))


def test_a_folder_without_its_record_is_no_bundle(copied: Path) -> None:
    (copied / contents.RECORD).unlink()
    with pytest.raises(UserError, match="no whole bundle here"):
        artefact.load(copied)
    with pytest.raises(UserError, match="no whole bundle here"):
        artefact.load(copied / "nowhere")


@pytest.mark.parametrize("name", [contents.WEIGHTS, contents.EXAMPLES])
def test_missing_cut_and_changed_files(copied: Path, name: str) -> None:
    path = copied / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(UserError, match="damaged"):
        artefact.load(copied)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="checksum"):
        artefact.load(copied)
    path.unlink()
    with pytest.raises(UserError, match="no file"):
        artefact.load(copied)
    path.write_bytes(whole)
    artefact.load(copied)


def test_a_damaged_or_foreign_record(copied: Path) -> None:
    path = copied / contents.RECORD
    record = msgspec.json.decode(path.read_bytes())
    for change, words in (
        (b"{", "damaged"),
        (msgspec.json.encode(record | {"format": 1}), "format 1"),
        (msgspec.json.encode(record | {"signature": record["signature"] | {"classes": ["yes", "no"]}}), "damaged"),
        (msgspec.json.encode({"format": contents.FORMAT}), "damaged or of another version"),
    ):
        path.write_bytes(change)
        with pytest.raises(UserError, match=words):
            artefact.load(copied)


def test_nothing_in_a_bundle_is_a_pickle(fruit: Path) -> None:
    assert sorted(path.name for path in fruit.iterdir()) == ["bundle.json", "examples.json", "model.safetensors"]
    for path in fruit.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_examples_are_made_up_and_accepted(fruit: Path) -> None:
    made = making.fruit()
    rows = examples.read(fruit).rows
    assert rows == examples.rows(Predictor(fruit)) and len(rows) == examples.NUM_ROWS
    length = made.transform.numeric[0]
    assert [row["length"] for row in rows[-2:]] == [length.minimum, length.maximum]
    assert {row["colour"] for row in rows} <= {"green", "red"}
    examples.check(Predictor(fruit))


@pytest.mark.parametrize(("columns", "answered"), [("a", 2), ("a, b", 0)])
def test_examples_are_rows_that_the_users_functions_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str, answered: int
) -> None:
    """A function that fails for what is made up costs examples, not the bundle; only the training cells are known."""
    table = pa.table(
        {"a": [1.5123, 2.0, 3.0, 4.5123] * 5, "b": [4.0, 3.0, 1.0, 2.0] * 5, "y": [1.0, 2.0, 4.0, 8.0] * 5}
    )
    known = set(zip(*(table[name].to_pylist() for name in columns.split(", ")), strict=True))
    (tmp_path / f"own_lookup_{answered}.py").write_text(
        f"import pyarrow as pa\n\nKNOWN = {dict.fromkeys(known, 1.0)}\n\n\ndef look(table):\n"
        "    return pa.array([KNOWN[row] for row in zip(*(column.to_pylist() for column in table.columns))])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    derive = {"found": f"own_lookup_{answered}:look({columns})"}
    made = making.made(table, "y", {"a": "number", "b": "number"}, steps=0, derive=derive)
    predictor = Predictor(made.stage(tmp_path / "bundle"))
    assert len(examples.read(predictor.bundle.folder).rows) == answered
    examples.check(predictor)
    model = forms.Model(predictor)
    document = openapi.document(model, tensors.Tensors(model), 1000)
    shown = document["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert len(shown["application/json"]["examples"]["data"]["value"]["data"]) == min(1, answered)


def test_a_bundle_that_answers_otherwise_than_its_examples_is_refused(copied: Path) -> None:
    recorded = examples.read(copied)
    changed = msgspec.structs.replace(recorded, outputs=[[1 - p for p in row] for row in recorded.outputs])
    storage.write_record(copied / contents.EXAMPLES, changed)
    record = storage.read_record(copied / contents.RECORD, contents.BundleRecord)
    storage.write_record(copied / contents.RECORD, msgspec.structs.replace(record, files=contents.listed(copied)))
    with pytest.raises(RunFailed, match="differ from those"):
        examples.check(Predictor(copied))


def test_weights_of_another_network(fruit: Path, tmp_path: Path) -> None:
    made = making.fruit()
    other: Any = making.Made(
        made.signature, made.transform, registry.ModelSpec("mlp", {"hidden": [3], "dropout": 0.0}), made.model
    )
    with pytest.raises(UserError, match="weights do not fit"):
        other.stage(tmp_path / "bundle")
