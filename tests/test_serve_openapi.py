"""What the OpenAPI document says, asked of the running server: requests that schemathesis draws, good and bad."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import asking
import made as making
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from raylway.bundle.predictor import Predictor
from serve_app.service import Service

load_all_checks()
PATIENT = {"X-Request-Timeout-Ms": "30000"}


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    bundle = making.fruit().stage(tmp_path_factory.mktemp("fruit") / "bundle", name="fruit")
    with asking.local(Service(Predictor(bundle), 64)) as client:
        document = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
        yield [each.ok() for each in document.get_all_operations()]


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_requests_drawn_from_the_document(operations: list[Any], mode: GenerationMode) -> None:
    """Each answer is of a documented status, type and form, and never a failure; a request that the document does not
    allow is refused, and one that it allows is answered.

    Left out of the last: what JSON Schema can't say, that ids are as many as rows, and that
    tensors and the columns of a frame fit the features.
    """
    asked = 0
    for operation in operations:
        if operation.method.upper() == "POST" or mode is GenerationMode.POSITIVE:
            asked += ask(operation, mode)
    assert asked > 40


def ask(operation: Any, mode: GenerationMode) -> int:
    """Send requests drawn for one operation; how many they were."""
    is_post, is_good = operation.method.upper() == "POST", mode is GenerationMode.POSITIVE
    asked = 0

    @given(operation.as_strategy(generation_mode=mode))
    @settings(max_examples=20 if is_post else 1, suppress_health_check=list(HealthCheck))
    def send(case: Any) -> None:
        nonlocal asked
        asked += 1
        answer = case.call(headers=PATIENT if is_post and is_good else None)
        case.validate_response(answer, excluded_checks=[CHECKS.get_one("positive_data_acceptance")])
        if is_good and not (
            is_post and (case.path.endswith("/infer") or {"ids", "dataframe_split"} & case.body.keys())
        ):
            assert answer.status_code == 200, answer.text

    send()
    return asked
