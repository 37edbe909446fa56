"""The HTTP status of errors that other processes have told the service."""

from __future__ import annotations

import pytest

from mullion.base.errors import MullionError
from mullion.parent.api.errors import status_of

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("exit_code", "status"), [(12, 403), (3, 404), (4, 409), (7, 503), (9, 507), (1, 500), (99, 500)]
)
def test_an_error_of_a_class_that_is_not_loaded_has_the_status_of_its_kind(exit_code: int, status: int) -> None:
    """A worker has libraries, and errors, that the service never imports."""
    fields = {"code": "a-kind-of-the-worker", "message": "no", "remedy": "none", "exit_code": exit_code}
    error = MullionError.from_wire(fields)
    assert status_of(error) == status
    assert error.to_wire()["code"] == "a-kind-of-the-worker"
