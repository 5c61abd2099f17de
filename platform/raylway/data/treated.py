"""From the job's `data.transform` and the features to what fitting is told."""

from __future__ import annotations

from raylway.data.roles import Names, Roles
from raylway.features.plan import FitPlan, treatments
from raylway.features.signature import Task
from raylway.job.load import LoadedJob, located


def fit_plan(loaded: LoadedJob, names: Names, roles: Roles, task: Task, classes: list[str]) -> FitPlan:
    """What fitting needs to know.

    Args:
        loaded: The job.
        names: Its names.
        roles: The features.
        task: What the model does.
        classes: In order; empty for regression.

    Raises:
        UserError: `data.transform` asks for what can't be.
    """
    used = [*roles.numeric, *roles.categorical, names.target]
    needed = frozenset().union(*map(names.derives, used))
    read = frozenset().union(*map(names.reads, roles.derive))
    section = loaded.job.data.transform
    with located(loaded):
        columns = treatments(section, roles.numeric, roles.categorical, roles.date)
    return FitPlan(
        derive={name: text for name, text in names.derive.items() if name in needed},
        served=list(roles.derive),
        numeric=roles.numeric,
        categorical=roles.categorical,
        date=roles.date,
        behind=[name for name in names.columns if name in read and name not in columns],
        columns=columns,
        target=names.target,
        task=task,
        classes=classes,
        drops_missing=loaded.job.data.clean.missing == "drop",
    )


def ineffective(loaded: LoadedJob, roles: Roles) -> list[str]:
    """What the job says of the transform to no effect."""
    section = loaded.job.data.transform
    features = {*roles.numeric, *roles.categorical, *roles.date}
    sentences = [
        f"data.transform.columns.{name} has no effect: the column is no feature"
        for name in section.columns
        if name not in features
    ]
    said = {key for part in (section, *section.columns.values()) for key in part.model_fields_set}
    if useless := sorted(said & {"impute", "indicator"}) if loaded.job.data.clean.missing == "drop" else []:
        sentences.append(
            f"data.transform: {' and '.join(useless)} have no effect, for rows with missing cells are left out "
            "(data.clean.missing: impute keeps them)"
        )
    return sentences
