"""What ruins models, found in the data before anything is trained; every warning says what to do.

Each test is sharp enough to stay silent on ordinary data: a warning that is often wrong is not read.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raylway.data.describe import SIDE, Column
from raylway.data.split import TEST, TRAIN
from raylway.features import dates
from raylway.features.profile import BINS, bins
from raylway.features.schema import as_float64, canonical_text
from raylway.features.shift import KS_LIMIT, PSI_LIMIT, counts_chance, ks, ks_chance, psi
from raylway.features.signature import Task

_NEARLY = 0.99
"""A feature that alone is right so often, or ranks two classes so well, gives the target away."""
_CORRELATED = 0.999
_FEW = 10
"""Fewer training rows of a class than these teach nothing and measure nothing."""
_LEAST_ROWS = 50
"""Of a sample: fewer prove nothing."""
_CHANCE = 0.01
"""How often the test of train against test may be wrong by chance, over all columns (Bonferroni)."""
_PLAIN_NUMBER = re.compile(r"\s*[+-]?[\d.]+\s*", re.ASCII)
_OTHER_NUMBER = re.compile(
    r"[+-]?[$€£¥]? ?(\d{1,3}([,.'\u00a0\u202f]\d{3})+([.,]\d+)?|\d+([.,]\d+)?) ?[%$€£¥]?", re.ASCII
)
_ID_NAME = re.compile(
    r"(?i:(?:^|[_. -])(?:id|ids|uuid|guid|key|index|rowid|rownum|no|nr)$|^unnamed|"
    r"(?:user|customer|client|order|account|item|product|patient|session|transaction|record|case|member|employee|"
    r"student|passenger|event|device)id$)|[a-z]I[dD]$"
)
"""`paid`, `grid` and `valid` are none."""
_NEARLY_ALL = 0.9
_EPOCH = 631_152_000, 2_208_988_800
"""Seconds since 1970 of the years 1990 and 2040: numbers between them that ascend with the rows are times."""


@dataclass(frozen=True)
class Subject:
    """What is looked at.

    Args:
        columns: Of the source and derived, over all rows that could be read.
        numeric: Numeric features.
        categorical: Categorical features.
        target: The target's name.
        task: What the model does.
        classes: Training rows by class; empty for regression or where it is not known yet.
        split: How the rows were divided, in the words of the job file.
        dropped: Columns that the job leaves out by name.
        date: Features that are dates.
    """

    columns: dict[str, Column]
    numeric: list[str]
    categorical: list[str]
    target: str
    task: Task
    classes: dict[str, int]
    split: str
    dropped: list[str]
    date: list[str] = field(default_factory=list)


def find(subject: Subject, sample: pa.Table | None) -> list[str]:
    """One sentence for each danger.

    Args:
        subject: The data and its roles.
        sample: Typed source and derived columns of some kept rows with `SIDE`; None if there is none.
    """
    found = [*_decimal_commas(subject), *_identifiers(subject), *_constant(subject), *_mostly_missing(subject)]
    found += _small_classes(subject)
    if sample is not None and sample.num_rows:
        found += [*_give_aways(subject, sample), *_different_sides(subject, sample), *_time_order(subject, sample)]
        found += [*_spelt_alike(subject, sample), *_other_numbers(subject, sample)]
    return found


def looks_like_identifier(name: str, column: Column) -> str:
    """Why a column of whole numbers is a counter or a key and no measurement; empty if it does not look like one.

    The rule: at least 50 numbers, all whole, and either the column is called like an identifier (id, customer_id,
    userId, index, key, uuid) and 9 of 10 numbers differ, or all differ (beyond 4,096 values: nearly all) and follow one
    another without large gaps, at most twice as many places as numbers.
    """
    present = column.present
    if column.type not in ("int64", "float64") or not column.whole or present < _LEAST_ROWS or column.infinite:
        return ""
    if _ID_NAME.search(name) and column.distinct >= _NEARLY_ALL * present:
        return "its whole numbers are different in nearly every row and it is named like an identifier"
    if column.distinct < present * (1 if column.is_exact else 0.93):
        return ""
    low, high = column.minimum, column.maximum
    if low is not None and high is not None and high - low < 2 * present:
        return "its whole numbers are different in every row and follow one another like a counter"
    return ""


def _decimal_commas(subject: Subject) -> Iterator[str]:
    for name, column in subject.columns.items():
        if column.has_decimal_commas and name not in subject.dropped:
            example = next((text for text in [*column.examples, *column.frequent] if "," in text), "1,5")
            yield (
                f"column {name!r} is read as text although its cells are numbers with a comma, such as {example!r}. If "
                'it is the decimal sign of your CSV files, write data.read.decimal: ","; take commas between thousands '
                "out of the file"
            )


def _identifiers(subject: Subject) -> Iterator[str]:
    for name in subject.numeric:
        if why := looks_like_identifier(name, subject.columns[name]):
            yield (
                f"column {name!r} looks like an identifier and is used as a feature: {why}. A model can learn the rows "
                "by heart from it; list it under data.features.drop unless it measures something"
            )
    for name in subject.categorical:
        column = subject.columns[name]
        if column.present >= _LEAST_ROWS and column.distinct > max(100, column.present / 2):
            yield (
                f"column {name!r} is used as a category although most of its {column.distinct:,} values stand in one "
                "row only: new rows will hold values that training never saw; list it under data.features.drop"
            )


def _constant(subject: Subject) -> Iterator[str]:
    for name in (*subject.numeric, *subject.categorical, *subject.date):
        column = subject.columns[name]
        if column.distinct == 1 and not column.infinite:
            missing = " where it is not missing" if column.missing else ""
            yield (
                f"column {name!r} is constant: it holds {column.examples[0]!r} in every row{missing} and can teach "
                "nothing; list it under data.features.drop, or see whether the source holds all its rows"
            )


def _mostly_missing(subject: Subject) -> Iterator[str]:
    for name in (*subject.numeric, *subject.categorical, *subject.date):
        column = subject.columns[name]
        if column.rows >= _FEW and column.missing > column.rows / 2:
            yield (
                f"column {name!r} misses {column.missing / column.rows:.0%} of its cells; with clean.missing: drop "
                "their rows are lost, with impute most of its values are made up. List it under data.features.drop, or "
                "set data.transform.indicator if it matters that the cell is empty"
            )


def _small_classes(subject: Subject) -> Iterator[str]:
    small = [f"{name} ({rows})" for name, rows in subject.classes.items() if rows < _FEW]
    if small:
        more = f" and {len(small) - 5} more" if len(small) > 5 else ""
        yield (
            f"few training rows of some classes of {subject.target!r}: {', '.join(small[:5])}{more}; the model hardly "
            f"learns them and their metrics are noise. Collect more, join small classes, or see data.balance"
        )


def _spelt_alike(subject: Subject, sample: pa.Table) -> Iterator[str]:
    """Values that a reader takes for one: ` yes`, `Yes` and `yes`; `é` as one character or as two."""
    for name in (*subject.categorical, *([subject.target] if subject.task == "classification" else [])):
        if not pa.types.is_string(sample.schema.field(name).type):
            continue
        spellings: dict[str, list[str]] = {}
        for text in sorted(pc.unique(sample[name]).drop_null().to_pylist()):
            spellings.setdefault(unicodedata.normalize("NFC", " ".join(text.split()).casefold()), []).append(text)
        if alike := [texts for texts in spellings.values() if len(texts) > 1]:
            shown = "; ".join(", ".join(repr(text[:60]) for text in texts[:4]) for texts in alike[:3])
            yield (
                f"column {name!r} holds values that differ in blanks, capitals or the form of an accent only: {shown}. "
                f"Each is a {'class' if name == subject.target else 'category'} of its own; write them alike in the "
                "source if they mean the same"
            )


def _other_numbers(subject: Subject, sample: pa.Table) -> Iterator[str]:
    """Columns of text that people read as numbers: `$5`, `12%`, `1,234.5`; `_decimal_commas` has the others."""
    for name, column in subject.columns.items():
        if name in (subject.target, *subject.dropped) or not pa.types.is_string(sample.schema.field(name).type):
            continue
        if column.has_decimal_commas:
            continue
        texts = [text for text in pc.unique(sample[name]).drop_null().to_pylist() if not _PLAIN_NUMBER.fullmatch(text)]
        alike = [text for text in texts if _OTHER_NUMBER.fullmatch(text.strip())]
        if alike and len(alike) > _NEARLY * len(texts):
            yield (
                f"column {name!r} is text although its cells look like numbers, such as {alike[0]!r}: it is read as "
                "categories or not at all. Write them with digits and a decimal point only"
            )


def _give_aways(subject: Subject, sample: pa.Table) -> Iterator[str]:
    target = sample[subject.target]
    classes = None
    if subject.task == "classification":
        classes = canonical_text(target).dictionary_encode().indices.to_numpy(zero_copy_only=False)
    aim = as_float64(target) if classes is None else np.zeros(0)
    for name in (*subject.numeric, *subject.categorical, *subject.date):
        is_number = name not in subject.categorical
        cells = _cells(sample[name], is_number)
        missing = np.isnan(cells) if is_number else cells < 0
        there = ~missing
        if classes is not None:
            found = _tells_classes(cells[there], is_number, classes[there])
            by_absence = _tells_classes(missing.astype(np.int64), False, classes) if missing.any() else ""
        else:
            found = _tells_number(cells[there], is_number, aim[there])
            by_absence = _tells_number(missing.astype(float), True, aim) if missing.any() else ""
        if by_absence:
            yield (
                f"column {name!r} gives the target {subject.target!r} away by being empty: {by_absence}. It is "
                "probably filled in after the event; list it under data.features.drop if it is not known by then"
            )
        elif found:
            yield (
                f"column {name!r} nearly equals the target {subject.target!r}: {found}. It probably holds the answer "
                "or is only known after it; list it under data.features.drop if a new row would not have it"
            )


def _cells(column: pa.ChunkedArray, is_number: bool) -> np.ndarray:
    """Numbers and instants as float64 with NaN for missing, categories as int64 codes with -1 for missing."""
    if is_number and pa.types.is_string(column.type):
        instants, valid = dates.parse(column)
        return np.where(valid, instants, np.nan)
    if is_number:
        return as_float64(column)
    encoded = canonical_text(column).dictionary_encode()
    return pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)


def _tells_classes(cells: np.ndarray, is_number: bool, classes: np.ndarray) -> str:
    """Why one feature alone tells the classes apart: a rule learnt on every second row, tried on the others; or for two
    classes how well its numbers rank them. Empty if it does not."""
    sizes = np.bincount(classes)
    if len(classes) < _LEAST_ROWS or len(sizes) < 2 or len(classes) - sizes.max() < 20:
        return ""
    if is_number and len(sizes) == 2:
        there = ~np.isnan(cells)
        area = _ranked(cells[there], classes[there] == 1)
        if max(area, 1 - area) > _NEARLY:
            return f"its order alone ranks the classes with a ROC-AUC of {max(area, 1 - area):.4f}"
    codes = _binned(cells) if is_number else cells + 1
    if codes.max() > len(codes) / 4:
        return ""  # so many values that a rule by value is no rule
    table = np.zeros((codes.max() + 1, len(sizes)), np.int64)
    np.add.at(table, (codes[::2], classes[::2]), 1)
    right = float((table.argmax(axis=1)[codes[1::2]] == classes[1::2]).mean())
    wrong_before = 1 - float((classes[1::2] == sizes.argmax()).mean())
    if right > _NEARLY and 1 - right < wrong_before / 10:
        return f"the class that goes with its value is right in {right:.1%} of rows that the rule was not made from"
    return ""


def _tells_number(cells: np.ndarray, is_number: bool, aim: np.ndarray) -> str:
    """Why one feature alone tells the number: their correlation or that of their ranks, or how much of the target's
    variance the means by category leave, learnt on every second row and tried on the others. Empty if it does not."""
    both = np.isfinite(cells) & np.isfinite(aim)
    cells, aim = cells[both], aim[both]
    if len(aim) < _LEAST_ROWS or len(np.unique(cells)) < 2 or len(np.unique(aim)) < 2:
        return ""
    if is_number:
        with np.errstate(all="ignore"):  # of numbers without a spread or beyond the doubles nothing is told
            together = float(np.corrcoef(cells, aim)[0, 1])
        if abs(together) > _CORRELATED:
            return f"their correlation is {together:.5f}"
        ranks = float(np.corrcoef(_ranks(cells), _ranks(aim))[0, 1])
        return f"the correlation of their ranks is {ranks:.5f}" if abs(ranks) > _CORRELATED else ""
    if cells.max() >= len(cells) / 4:
        return ""
    sums, sizes = (np.bincount(cells[::2], weights, cells.max() + 1) for weights in (aim[::2], None))
    known = sizes[cells[1::2]] > 0
    others, values = aim[1::2][known], cells[1::2][known]
    if len(others) < 20 or not others.var():
        return ""
    explained = 1 - float(((others - sums[values] / sizes[values]) ** 2).mean() / others.var())
    if explained > _CORRELATED**2:
        return f"the means by its value explain {explained:.2%} of the variance in rows that they were not made from"
    return ""


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places]


def _ranked(values: np.ndarray, positive: np.ndarray) -> float:
    """ROC-AUC of values against two classes; ties count half (Mann and Whitney 1947)."""
    first, second = int(positive.sum()), int((~positive).sum())
    if min(first, second) < 20:
        return 0.5
    ranks = _ranks(values)
    return float((ranks[positive].sum() - first * (first + 1) / 2) / (first * second))


def _binned(values: np.ndarray) -> np.ndarray:
    """The bin of each number among 32 with as many rows each; 0 for a missing one."""
    present = values[~np.isnan(values)]
    if not len(present):
        return np.zeros(len(values), np.int64)
    edges = np.unique(np.quantile(present, np.arange(1, 32) / 32, method="higher"))
    return np.where(np.isnan(values), 0, np.searchsorted(edges, values, side="right") + 1)


def _time_order(subject: Subject, sample: pa.Table) -> Iterator[str]:
    """Rows that stand in the order of a column of dates, or of seconds or milliseconds since 1970, split by chance."""
    if subject.split in ("time", "group", "column", "files"):
        return
    for name, column in subject.columns.items():
        if name in subject.dropped or name == subject.target:
            continue
        if column.is_date:
            instants = dates.parse(sample[name].drop_null())[0]
        elif column.type == "int64" and _are_epochs(column):
            instants = sample[name].drop_null().to_numpy()
        else:
            continue
        rises = int((instants[1:] > instants[:-1]).sum())
        falls = int((instants[1:] < instants[:-1]).sum())
        if rises >= _LEAST_ROWS and falls <= rises / 100:
            what = "dates" if column.is_date else "times"
            yield (
                f"the rows stand in the order of the {what} in {name!r} and are split by chance: test rows lie between "
                "training rows of the same days, which flatters a model that is to foresee. Write data.split: "
                f"{{by: time, column: {name}}}, or list {name!r} under data.features.drop if time does not matter"
            )


def _are_epochs(column: Column) -> bool:
    low, high = column.minimum or 0, column.maximum or 0
    return any(_EPOCH[0] * unit <= low and high < _EPOCH[1] * unit for unit in (1, 1000))


def _different_sides(subject: Subject, sample: pa.Table) -> Iterator[str]:
    side = sample[SIDE].to_numpy()
    names = [*subject.numeric, *subject.categorical]
    if min((side == TRAIN).sum(), (side == TEST).sum()) < _LEAST_ROWS:
        return
    found = []
    for name in names:
        cells = _cells(sample[name], name in subject.numeric)
        train, test = cells[side == TRAIN], cells[side == TEST]
        if name in subject.numeric:
            train, test = train[~np.isnan(train)], test[~np.isnan(test)]
            if min(len(train), len(test)) >= _LEAST_ROWS:
                edges = np.unique(np.quantile(train, np.arange(1, 5 * BINS) / (5 * BINS), method="higher")).tolist()
                apart = ks(bins(edges, train), bins(edges, test))
                if apart > KS_LIMIT and ks_chance(apart, len(train), len(test)) < _CHANCE / len(names):
                    found.append((apart, f"{name} (KS {apart:.2f})"))
        elif cells.max() >= 0:
            counts = [np.bincount(part[part >= 0], minlength=cells.max() + 1) for part in (train, test)]
            apart = psi(*counts)
            if apart > PSI_LIMIT and counts_chance(*counts) < _CHANCE / len(names):
                found.append((apart, f"{name} (PSI {apart:.2f})"))
    if found:
        found.sort(key=lambda each: (-each[0], each[1]))
        listed = ", ".join(text for _, text in found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        yield (
            f"train and test differ in {listed}, more than chance explains, under the split by {subject.split}: the "
            "test metrics measure other rows than those that the model learnt. Right for a split by time or group that "
            "you want; otherwise split at random or leave these columns out"
        )
