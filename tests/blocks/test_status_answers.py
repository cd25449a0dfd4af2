"""What a status code leads to, on the inference side and on the control side (protocol §2, §13)."""

import pytest

from hotload.clients.service.calls import raise_for
from hotload.errors import (
    ProtocolError,
    ServiceError,
    ServiceRefusedError,
    ServiceUnavailableError,
    SnapshotRejectedError,
)
from hotload.rollout.failures import Action, failure_of_status

ANSWERS: dict[tuple[int, ...], tuple[Action, type[ServiceError]]] = {
    (302, 307): (Action.STOP_RUN, ProtocolError),
    (400, 413, 422): (Action.FAIL_SAMPLE, SnapshotRejectedError),
    (401, 402, 403): (Action.STOP_RUN, ServiceRefusedError),
    (404,): (Action.WAIT_FOR_SWAP, ServiceRefusedError),
    (405, 409, 412): (Action.STOP_RUN, SnapshotRejectedError),
    (408, 429, 500, 502, 503, 504): (Action.RETRY, ServiceUnavailableError),
    (425,): (Action.WAIT_FOR_SWAP, SnapshotRejectedError),
}


@pytest.mark.parametrize(
    ("status", "action", "error"),
    [(status, *answer) for statuses, answer in ANSWERS.items() for status in statuses],
)
def test_a_status_has_one_answer_on_either_side(
    status: int, action: Action, error: type[ServiceError]
) -> None:
    assert failure_of_status(status, "", "").action is action
    with pytest.raises(ServiceError) as caught:
        raise_for(status, "signal", "", SnapshotRejectedError)
    assert type(caught.value) is error
