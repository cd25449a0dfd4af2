"""What a cycle asks of the Prefect server: few calls, because each costs it time."""

from __future__ import annotations

import pytest

from benchmarks.counting_proxy import counting_proxy
from tests.flows.fleet import Fleet
from tests.flows.test_ways_in import cycle_file, python

CALLS = 20

pytestmark = pytest.mark.timeout(600)


def test_a_delta_cycle_makes_few_calls(fleet: Fleet, prefect_api: str) -> None:
    with counting_proxy(prefect_api) as (address, calls):
        for version in (1, 2):
            calls.clear()
            done = python("flows", cycle_file(fleet, version), PREFECT_API_URL=f"{address}/api")
            assert done.returncode == 0, done.stderr
    assert "delta" in done.stdout
    # The log is sent every two seconds, so its calls are as many as the machine is slow.
    assert len([call for call in calls if call != "POST /api/logs/"]) < CALLS, calls
