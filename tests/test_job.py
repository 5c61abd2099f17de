"""The job file: what is accepted, what every mistake is told, and that the written-out job is the same job."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from raylway.errors import UserError
from raylway.job.load import load_job, located
from raylway.job.schema import Job
from raylway.job.units import Duration

SMALL = "name: small\nstorage: runs\ndata: {source: rows.csv, target: y}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_job(write(folder, text), overrides)
    return str(caught.value)


def every_key(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        keys.append(key)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += every_key(field.annotation, f"{key}.")
    return keys


def test_the_keys_are_these() -> None:
    """A new key is a decision: it needs a reader, a test, a line in docs/job-file.md, and its place in this list."""
    expected = """
        format name seed storage task
        data data.source
        data.read data.read.format data.read.delimiter data.read.quote data.read.encoding
        data.read.columns data.read.decimal data.read.missing
        data.target data.derive
        data.features data.features.numeric data.features.categorical data.features.date data.features.drop
        data.transform data.transform.scale data.transform.impute data.transform.indicator data.transform.bins
        data.transform.categories data.transform.rare data.transform.columns
        data.clean data.clean.missing data.clean.duplicates data.clean.invalid data.clean.max_invalid
        data.clean.infinite
        data.split data.split.by data.split.column data.split.at data.split.validation data.split.test data.balance
        model model.kind model.hidden model.dropout model.compile model.args
        train train.for train.global_batch train.microbatch train.precision
        train.optimizer train.optimizer.kind train.optimizer.lr train.optimizer.weight_decay train.optimizer.momentum
        train.optimizer.ema
        train.optimizer.spike train.optimizer.spike.then train.optimizer.spike.deviations train.optimizer.spike.window
        train.schedule train.schedule.kind train.schedule.warmup train.schedule.every train.schedule.gamma
        train.schedule.decay
        train.clip train.workers train.resources train.resources.cpus train.resources.gpus
        train.parallel train.parallel.shard train.parallel.tensor train.parallel.pipeline train.parallel.schedule
        train.checkpoint train.checkpoint.every train.checkpoint.keep
        train.validate train.validate.every train.validate.best train.validate.patience
        serve serve.replicas serve.replicas.min serve.replicas.max serve.max_batch
    """
    assert every_key(Job) == expected.split()


def test_every_key_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "job-file.md").read_text()
    shown = set(re.findall(r"\w+", " ".join(re.findall(r"`[^`\n]+`", page))))
    assert {key.rsplit(".", 1)[-1] for key in every_key(Job)} <= shown


def test_no_section_has_more_than_twelve_keys() -> None:
    keys = every_key(Job)
    for section in {key.rpartition(".")[0] for key in keys}:
        assert sum(key.rpartition(".")[0] == section for key in keys) <= 12, section


def test_a_four_line_job_has_defaults(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, SMALL)).job
    assert (job.seed, job.model.kind, job.data.clean.missing, job.train.duration) == (42, "mlp", "drop", "auto")


def test_yaml_is_version_1_2(tmp_path: Path) -> None:
    text = SMALL + 'train: {optimizer: {lr: 1e-3}}\nmodel: {kind: "m:f", args: {no: no, at: 12:30}}\n'
    job = load_job(write(tmp_path, text)).job
    assert job.train.optimizer.lr == 0.001
    assert job.model.args == {"no": "no", "at": "12:30"}


@pytest.mark.parametrize("key", [key for key in every_key(Job) if len(key.rsplit(".", 1)[-1]) > 3])
def test_a_misspelt_key_is_told_with_file_line_and_the_right_one(tmp_path: Path, key: str) -> None:
    *sections, right = key.split(".")
    wrong = right[:-2] + right[-1] + right[-2] if right[-1] != right[-2] else right + "x"
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(sections)]
    text = "\n".join([*lines, f"{'  ' * len(sections)}{wrong}: 1"]) + "\n"
    message = refused(tmp_path, text)
    told = next(line for line in message.splitlines() if "unknown key" in line)
    assert f"job.yaml:{len(sections) + 1}:" in told or f"{wrong!r}"[1:-1] in told
    assert f"did you mean {right!r}" in told


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("seed: many", ["job.yaml:4", "seed", "whole number", "'many'"]),
        ("seed: yes", ["seed", "whole number", "'yes'"]),
        ("seed: true", ["seed", "whole number", "boolean"]),
        ("seed: -1", ["seed", "greater than or equal to 0", "-1"]),
        ("name: 7", ["duplicate key"]),
        ("train: {for: 20}", ["train.for", "with a unit", "found the whole number 20"]),
        ("train: {for: 20 minutes}", ["train.for", "'minutes' does not fit here"]),
        ("train: {for: 1.5 steps}", ["train.for", "whole number of steps"]),
        ("train: {for: 1e999 epochs}", ["train.for", "too large"]),
        ("train: {optimizer: {lr: .inf}}", ["train.optimizer.lr", "finite"]),
        ("train: {workers: 0}", ["train.workers", "greater than or equal to 1", "'auto'"]),
        ("train: {clip: -1}", ["train.clip", "greater than 0"]),
        ("train: {schedule: {kind: step}}", ["train.schedule", "every and gamma"]),
        ("train: {schedule: {gamma: 0.1}}", ["train.schedule", "kind step only"]),
        ("train: {schedule: {kind: cosine, decay: 5 steps}}", ["train.schedule", "kind wsd only"]),
        ("train: {schedule: {kind: wsd, decay: 0 steps}}", ["train.schedule", "above zero"]),
        ("train: {optimizer: {momentum: 0.9}}", ["train.optimizer", "sgd only"]),
        ("train: {parallel: {shard: 2, pipeline: 2}}", ["train.parallel", "one of", "shard and pipeline"]),
        ("train: {parallel: {tensor: 2, schedule: gpipe}}", ["train.parallel", "pipeline above 1", "gpipe"]),
        ("train: {parallel: {shard: 0}}", ["train.parallel.shard", "greater than or equal to 1"]),
        ("train: {optimizer: {ema: 1}}", ["train.optimizer.ema", "less than 1"]),
        ("train: {optimizer: {spike: {window: 0 steps}}}", ["train.optimizer.spike", "above zero"]),
        ("train: {optimizer: {spike: {then: rollback}}}", ["train", "checkpoint.every in steps or epochs", "5 min"]),
        ("serve: {replicas: {min: 3, max: 2}}", ["serve.replicas", "at most max (2)"]),
        ("serve: 3", ["serve", "section"]),
        ("model: {kind: tree}", ["model.kind"]),
        ("model: {args: {a: 1}}", ["model", "model of your own"]),
        ('model: {kind: "m:f", hidden: [3]}', ["model", "hidden under args"]),
        ("format: 2", ["format", "1"]),
    ],
)
def test_a_wrong_value_is_told_with_key_expectation_and_finding(tmp_path: Path, line: str, words: list[str]) -> None:
    message = refused(tmp_path, f"{SMALL}{line}\n")
    for word in words:
        assert word in message


def test_wrong_values_inside_data(tmp_path: Path) -> None:
    def told(more: str) -> str:
        return refused(tmp_path, f"name: small\ndata: {{source: a.csv, target: y, {more}}}\n")

    assert "below 100%" in told("split: {validation: 50%, test: 50%}")
    assert "data.split.test" in told("split: {test: 20}")
    assert "in one list only" in told("features: {numeric: [a], drop: [a]}")
    assert "'drop' or 'impute'" in told("clean: {missing: keep}")


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    message = refused(tmp_path, "name: a b\nseed: x\ndata: {source: a.csv}\n")
    assert all(word in message for word in ("job.yaml:1", "job.yaml:2", "data.target"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["mapping of keys"]),
        ("- a\n", ["mapping of keys"]),
        ("name: [\n", ["not YAML", "job.yaml"]),
        ("name: a\n\tseed: 1\n", ["not YAML", "job.yaml:2"]),
        ("name: a\nname: b\n", ["job.yaml:2", "duplicate key"]),
    ],
)
def test_what_is_no_job_at_all(tmp_path: Path, text: str, words: list[str]) -> None:
    message = refused(tmp_path, text)
    assert all(word in message for word in words)


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    with pytest.raises(UserError, match="did you mean .*job.yaml"):
        load_job(tmp_path / "jop.yaml")
    with pytest.raises(UserError, match="can't be read"):
        load_job(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        load_job(tmp_path / "latin.yaml")


def test_set_overrides_and_its_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    job = load_job(path, ["train.optimizer.lr=1e-2", "data.features.drop=[a, b]", "train.clip=null"]).job
    assert (job.train.optimizer.lr, job.data.features.drop, job.train.clip) == (0.01, ["a", "b"], None)
    assert "--set train.optimizr" in refused(tmp_path, SMALL, "train.optimizr.lr=1")
    assert "key=value" in refused(tmp_path, SMALL, "seed")
    assert "whole number" in refused(tmp_path, SMALL, "seed=x")


def test_location_names_the_nearest_line(tmp_path: Path) -> None:
    loaded = load_job(write(tmp_path, SMALL))
    assert loaded.location("data.target").endswith("job.yaml:3 (data.target)")
    assert loaded.location("data.features.drop").endswith("job.yaml:3 (data.features.drop)")
    assert loaded.location("seed").endswith("job.yaml (seed)")


@given(
    amount=st.integers(0, 10**6),
    unit=st.sampled_from(["epoch", "epochs", "step", "steps"]),
    lr=st.floats(1e-9, 1e3),
    hidden=st.lists(st.integers(1, 4096), max_size=4),
    share=st.integers(0, 49),
)
@settings(max_examples=60)
def test_the_written_out_job_is_the_same_job(
    tmp_path_factory: pytest.TempPathFactory, amount: int, unit: str, lr: float, hidden: list[int], share: int
) -> None:
    folder = tmp_path_factory.mktemp("job")
    text = (
        f"{SMALL}model: {{hidden: {hidden}}}\n"
        f"train: {{for: {amount} {unit}, optimizer: {{lr: {lr!r}}}, checkpoint: {{every: {share + 1} min}}}}\n"
    )
    loaded = load_job(write(folder, text), [f"data.split.test={share}%"])
    assert loaded.job.train.duration == Duration(amount, "epochs" if unit.startswith("epoch") else "steps")
    (folder / "again.yaml").write_bytes(loaded.to_yaml())
    assert load_job(folder / "again.yaml").job == loaded.job


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.for", "1234567 steps"),
        ("train.for", "0.12345678 epochs"),
        ("train.checkpoint.every", "1234567.5 s"),
        ("data.clean.max_invalid", "0.00000037"),
        ("data.split.test", "0.123456789"),
        ("data.split.test", "0.07"),
        ("data.split.validation", "33.3333333%"),
    ],
)
def test_a_value_keeps_every_digit_when_it_is_written_out(tmp_path: Path, key: str, value: str) -> None:
    """Run ids and fingerprints come from the written-out job: two values with one text would be one run."""
    loaded = load_job(write(tmp_path, SMALL), [f"{key}={value}"])
    (tmp_path / "again.yaml").write_bytes(loaded.to_yaml())
    assert load_job(tmp_path / "again.yaml").job == loaded.job
    neighbour = load_job(write(tmp_path, SMALL), [f"{key}={value.replace('7', '8').replace('3', '4')}"])
    assert neighbour.job.model_dump_json(by_alias=True) != loaded.job.model_dump_json(by_alias=True)


def test_a_share_is_written_as_a_percentage_where_that_is_exact(tmp_path: Path) -> None:
    assert "test: 20%" in load_job(write(tmp_path, SMALL)).to_yaml().decode()


@pytest.mark.parametrize("name", ["prepared", "latest"])
def test_a_job_may_not_have_the_name_of_something_else(tmp_path: Path, name: str) -> None:
    assert "another name" in refused(tmp_path, SMALL.replace("small", name))


@pytest.mark.parametrize("key", ["data.source", "storage"])
def test_an_empty_path_is_refused(tmp_path: Path, key: str) -> None:
    """An empty path would be the folder itself: all its data files read, or runs strewn over it."""
    assert f"{key}: expected text of at least 1 character" in refused(tmp_path, SMALL, f'{key}=""')


def test_durations_in_steps() -> None:
    assert Duration(20, "epochs").in_steps(7) == 140
    assert Duration(0.01, "epochs").in_steps(7) == 1
    assert Duration(0, "steps").in_steps(7) == 0
    assert Duration(1.5, "h").seconds == 5400


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({}, "the key 'data.source.train' is missing"),
        ({"train": "a.csv", "tets": "b.csv"}, "unknown key 'data.source.tets'; did you mean 'test'?"),
        ({"train": 3}, "data.source.train: expected text or a list; found the whole number 3"),
        (3, "data.source: expected text or a list or a section like Files; found the whole number 3"),
    ],
)
def test_what_is_wrong_inside_a_section_that_could_be_text(tmp_path: Path, source: object, words: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps({"name": "a", "data": {"source": source, "target": "b"}}))
    with pytest.raises(UserError) as caught:
        load_job(path)
    assert words in caught.value.what and "\n" not in caught.value.what


def test_a_file_whose_name_looks_like_a_key_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("name: a\ndata: {source: data.csv, target: b}\n")
    for where, shown in (("data.csv:3", "data.csv:3"), ("data.target", f"{path}:2 (data.target)")):
        with pytest.raises(UserError) as caught, located(load_job(path)):
            raise UserError("wrong", where=where)
        assert caught.value.where == shown
