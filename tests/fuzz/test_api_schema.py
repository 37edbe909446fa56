"""The API against its own OpenAPI document: whatever is sent, the answer is one that the document allows, and no fault.

The cases are Schemathesis'; they are drawn by Hypothesis here, because its pytest plugin does not know this pytest.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.framework.api_service import ApiService

from mullion.model.views import ErrorView
from mullion.parent.operations import Operation

pytestmark = pytest.mark.fuzz

OPERATIONS = (
    ("GET", "/1.0/operations"),
    ("GET", "/1.0/operations/{operation_id}"),
    ("POST", "/1.0/operations/{operation_id}/cancel"),
    ("GET", "/1.0/operations/{operation_id}/wait"),
    ("GET", "/1.0/events"),
)
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiService]:
    with ApiService(tmp_path_factory.mktemp("s")) as service:

        async def fill() -> None:
            async def work(_operation: Operation) -> None:
                return None

            for number in range(3):
                view = await service.operations.start("test.kind", f"target/{number}", work)
                await service.operations.wait(view.id)
            await service.events.flush()

        service.call(fill)
        yield service


@pytest.fixture(scope="module")
def document(service: ApiService) -> schemathesis.BaseSchema:
    headers = {"Authorization": f"Bearer {service.token}"}
    return schemathesis.openapi.from_url(f"{service.server.url}/1.0/openapi.json", headers=headers)


def test_the_document_lists_what_is_tested(document: schemathesis.BaseSchema) -> None:
    found = {(result.ok().method.upper(), result.ok().path) for result in document.get_all_operations()}
    assert found == set(OPERATIONS)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_one_of_the_document(
    service: ApiService, document: schemathesis.BaseSchema, method: str, path: str, mode: GenerationMode
) -> None:
    headers = {"Authorization": f"Bearer {service.token}"}
    known = [view.id for view in service.operations.list()]
    operation = document[path][method]
    seen: set[int] = set()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(operation.as_strategy(generation_mode=mode), st.sampled_from([None, None, *known]))
    def ask(case: Case, operation_id: str | None) -> None:
        if operation_id is not None and "operation_id" in case.path_parameters:
            case.path_parameters["operation_id"] = operation_id
        for name in ("wait_s", "timeout_s"):
            if isinstance(case.query.get(name), int | float):
                case.query[name] = min(case.query[name], 0.01)
        answer = case.call(headers=headers, timeout=60)
        seen.add(answer.status_code)
        case.validate_response(answer, checks=CHECKS)
        if answer.status_code >= 400:
            error = msgspec.json.decode(answer.content, type=ErrorView)
            assert error.message
            assert error.remedy

    ask()
    if mode is GenerationMode.POSITIVE:
        assert seen & {200, 202, 409}, f"nothing was ever accepted: {seen}"
    else:
        assert seen & {400, 404, 405}, f"nothing was ever refused: {seen}"
