"""The raw data of `article.yaml`: 1,000 numeric features and 10 classes, made by scikit-learn."""

import pandas as pd
from sklearn.datasets import make_classification


def rows() -> pd.DataFrame:
    """6,000 rows with the columns `x0` to `x999` and `target`, the same at every call."""
    features, target = make_classification(
        n_samples=6_000,
        n_features=1_000,
        n_informative=40,
        n_redundant=60,
        n_classes=10,
        n_clusters_per_class=1,
        class_sep=2.0,
        random_state=0,
    )
    table = pd.DataFrame(features, columns=[f"x{index}" for index in range(features.shape[1])])
    table["target"] = target
    return table
