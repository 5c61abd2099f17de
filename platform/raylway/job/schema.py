"""The job file as types: every key, its meaning, its default and its bounds.

Strict at every level: an unknown key or a value of another type is an error (`load` turns it into a message with a
line). A key that is left out, or says `auto`, is derived from the data and the machine by `train.plan` and
`data.prepare`; `raylway check` prints what came out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raylway.job.section import Auto, Count, Real, Section, Text
from raylway.job.training import Train
from raylway.job.units import Share

_TAKEN_NAMES = ("prepared", "latest")
"""The folder of prepared data beside those of the jobs, and the word for the newest run."""


class Features(Section):
    """Which columns feed the model; a column in no list is used as its inferred type says."""

    numeric: list[str] = []
    """Columns to read as numbers; a cell that is no number is invalid."""
    categorical: list[str] = []
    """Columns to read as categories, whatever their type."""
    date: list[str] = []
    """Columns to read as dates or times; a cell that is none is invalid."""
    drop: list[str] = []
    """Columns to leave out of the features."""

    @model_validator(mode="after")
    def _once(self) -> Features:
        names = [*self.numeric, *self.categorical, *self.date, *self.drop]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expected each column in one list only; found twice: {', '.join(twice)}")
        return self


class Read(Section):
    """How the source's files are read; what is left out is found out by a stated rule and printed."""

    format: Literal["auto", "csv", "jsonl", "text", "parquet", "arrow"] = "auto"
    """`auto`: by the ending of the file's name."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | Auto = "auto"
    """What parts the cells of a CSV file; `auto`: the one of comma, semicolon, tab and bar that stands most often in
    the heading."""
    quote: Literal['"', "'", "none"] = '"'
    """What encloses a cell that holds a delimiter or line end."""
    encoding: Text = "auto"
    """Of text files, such as `cp1252`; `auto`: by the byte order mark, else UTF-8."""
    columns: list[Text] = []
    """Names of the columns of CSV files without a heading."""
    decimal: Literal[".", ","] = "."
    """The decimal sign of numbers in CSV files."""
    missing: list[Text | int | float] = []
    """Further cells that are missing, in every column: texts such as `?`, numbers such as -999."""

    @property
    def missing_words(self) -> list[str]:
        return [str(word) for word in self.missing]


class ColumnTransform(Section):
    """How one column becomes numbers."""

    scale: Literal["standard", "robust", "quantile", "log", "none"] | None = None
    impute: Literal["mean", "median", "most_frequent"] | float | Text | None = None
    """Also of a date and of a category: a date, or any text but those words, stands in itself."""
    indicator: bool | None = None
    bins: Annotated[int, Field(ge=2, le=1024)] | None = None
    categories: Literal["embedding", "one_hot"] | None = None
    rare: Count | None = None

    @model_validator(mode="after")
    def _scale_or_bins(self) -> ColumnTransform:
        if self.scale is not None and self.bins is not None:
            raise ValueError("expected scale or bins for a column, not both: bins are a scale of their own")
        return self


class Transform(Section):
    """How columns become the model's numbers, fitted on the training rows only."""

    scale: Literal["standard", "robust", "quantile", "log", "none"] = "standard"
    """`standard`: mean 0, spread 1. `robust`: median 0, interquartile range 1. `quantile`: the share of training rows
    below, from 0 to 1. `log`: sign(x) log(1 + |x|), then standard."""
    impute: Literal["mean", "median", "most_frequent"] | float = "mean"
    """What stands in for a missing number with `clean.missing: impute`; a number is that number. A missing category
    becomes the most frequent one, unless `columns` says otherwise."""
    indicator: bool = False
    """With `clean.missing: impute`, one more input for each feature that misses cells in training: 1 where it did."""
    bins: Annotated[int, Field(ge=2, le=1024)] | None = None
    """Piecewise-linear encoding of every numeric feature over so many quantile bins (arXiv 2203.05556); a column with a
    `scale` or `bins: null` of its own is scaled instead."""
    categories: Literal["embedding", "one_hot"] = "embedding"
    rare: Count = 1
    """Categories with fewer training rows than this share one code."""
    columns: dict[str, ColumnTransform] = {}
    """What differs for a column, by its name."""


class Clean(Section):
    """What happens to rows that can't be used as they are."""

    missing: Literal["drop", "impute"] = "drop"
    """`drop`: leave out rows with an empty cell in any column. `impute`: fill features from the training rows (the mean
    of a number, the most frequent category); a row without its target is always left out."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Rows equal in every column; the first stays."""
    invalid: Literal["quarantine", "error"] = "quarantine"
    """Rows that can't be read (too many or too few cells, a word in a column of numbers)."""
    max_invalid: Share = 0.01
    """More invalid rows than this share stop the job; it also decides when a column of numbers becomes text."""
    infinite: Literal["error", "missing"] = "error"
    """An infinite number stops the job, or counts as an empty cell."""

    def lets_pass(self, invalid: int, rows: int) -> bool:
        """Whether so many of so many rows may be invalid; 29% of 100 rows are 29, whatever rounding makes of it."""
        return invalid <= self.max_invalid * rows * (1 + 1e-12)


class At(Section):
    """Where a split by time is cut; a date or time in ISO 8601, or a number if the column holds numbers."""

    validation: str | int | float | None = None
    """First instant of the validation rows; left out: there are none."""
    test: str | int | float
    """First instant of the test rows."""


class Files(Section):
    """Separate files for the sides of the split."""

    train: Text | list[Text]
    validation: Text | list[Text] | None = None
    test: Text | list[Text] | None = None


class Split(Section):
    """How kept rows are divided; equal rows always fall on one side."""

    by: Literal["auto", "stratified", "random", "group", "time", "column"] = "auto"
    """`stratified` keeps the share of each class (exact counts). `group`: rows with one value of `column` stay on one
    side. `time`: the latest rows by `column` are for test, those before for validation. `column`: `column` says
    `train`, `validation` or `test`. `auto` is `stratified` for classification, else `random`."""
    column: Text | None = None
    """For `group`, `time` and `column`."""
    at: At | None = None
    """For `time`: the first instants of validation and test, instead of shares."""
    validation: Share = 0.1
    test: Share = 0.2

    @model_validator(mode="after")
    def _leaves_training(self) -> Split:
        if self.validation + self.test >= 1:
            raise ValueError("expected validation and test to leave rows for training: together below 100%")
        return self

    @model_validator(mode="after")
    def _column_fits(self) -> Split:
        needs = self.by in ("group", "time", "column")
        if needs and self.column is None:
            raise ValueError(f"expected column with by: {self.by}, such as {{by: {self.by}, column: NAME}}")
        if not needs and self.column is not None:
            raise ValueError(f"expected no column with by: {self.by}; it is for group, time and column")
        if self.at is not None and self.by != "time":
            raise ValueError(f"expected no at with by: {self.by}; it is for time")
        return self


class Data(Section):
    source: Text | list[Text] | Files
    """A file, glob or folder; `s3://bucket/path` or `gs://bucket/path`; `https://host/file.csv`; `pkg://package/path`;
    `python://module:function` (returns a table); or a list of these. Or `train`, `validation` and `test`, each such a
    source of its own: the split is then theirs. A relative path is looked for beside the job file, then in the current
    folder."""
    read: Read = Read()
    target: str
    """The column to predict; may be a derived one."""
    derive: dict[str, str] = {}
    """New columns by name, each an expression over columns, such as `arr_delay > 15`, or a function of yours,
    `module:function(column, column)`, which takes an Arrow table of these columns and returns one Arrow array. What the
    target derives from is not a feature."""
    features: Features = Features()
    transform: Transform = Transform()
    clean: Clean = Clean()
    split: Split = Split()
    balance: Literal["none", "weights", "resample"] = "none"
    """Training with classes of unequal size: `weights` weighs each row's loss by rows / (classes * rows of its class);
    `resample` draws each class equally often, with as many rows an epoch as there are."""


class Model(Section):
    kind: Annotated[str, Field(pattern=r"^(mlp|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")] = "mlp"
    """`mlp`, or `module:function` of your own: called with the signature and `args`, returns a `torch.nn.Module`."""
    hidden: list[Count] = [128, 64]
    """Widths of the hidden layers of `mlp`."""
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.1
    compile: bool = False
    """Train it as a graph that `torch.compile` makes before the first step; where that fails, as it is."""
    args: dict[str, Any] = {}
    """Keyword arguments for your own function."""

    @model_validator(mode="after")
    def _arguments_fit_kind(self) -> Model:
        if self.kind == "mlp" and self.args:
            raise ValueError("expected no args: they are for a model of your own; mlp takes hidden and dropout")
        given = self.model_fields_set & {"hidden", "dropout"}
        if self.kind != "mlp" and given:
            raise ValueError(f"expected {' and '.join(sorted(given))} under args: {self.kind} is a model of your own")
        return self


class Replicas(Section):
    min: Annotated[int, Field(ge=0)] = 1
    """0: none while nobody asks."""
    max: Count = 4

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"expected min to be at most max ({self.max}); found {self.min}")
        return self


class Serve(Section):
    replicas: Replicas = Replicas()
    max_batch: Count = 64
    """Most rows in one forward pass."""


class Job(Section):
    """One job file."""

    format: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    storage: Text = "runs"
    """The folder for prepared data and runs, or `s3://bucket/path` or `gs://bucket/path`."""
    task: Literal["classification", "regression"] | Auto = "auto"
    data: Data
    model: Model = Model()
    train: Train = Train()
    serve: Serve = Serve()

    @field_validator("name")
    @classmethod
    def _name_is_free(cls, name: str) -> str:
        if name in _TAKEN_NAMES:
            raise ValueError(f"expected another name: {' and '.join(_TAKEN_NAMES)} have a meaning of their own")
        return name
