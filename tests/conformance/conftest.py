"""One test for each adapter, dress and case."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conformance.adapters import DRESSES, ON_TRIAL, Adapter, load
from tests.conformance.checking import MAY_BE_PUBLISHED, MAY_NOT
from tests.conformance.encoding import for_encoders
from tests.conformance.pairs import PAIRS
from tests.conformance.suite import for_receivers

Trials = list[tuple[str, str | None, tuple[object, ...]]]  # id, why it is known to fail, values


def receiving(adapters: list[Adapter]) -> Trials:
    return [
        (f"{adapter.name}-{case}-{dress}", adapter.deviation(case, dress), (adapter, dress, case))
        for adapter in adapters
        for dress in DRESSES
        if str(dress) in adapter.reads
        for case in for_receivers(dress)
    ]


def encoding(adapters: list[Adapter]) -> Trials:
    return [
        (f"{adapter.name}-{case}-{dress}", adapter.deviation(case, dress), (adapter, dress, case))
        for adapter in adapters
        for dress in DRESSES
        if str(dress) in adapter.writes
        for case in for_encoders(dress)
    ]


def interchange(adapters: list[Adapter]) -> Trials:
    return [
        (f"{encoder.name}-{receiver.name}-{case}-{dress}", None, (encoder, receiver, dress, case))
        for encoder in adapters
        for receiver in adapters
        for dress in DRESSES
        if str(dress) in encoder.writes & receiver.reads
        for case in PAIRS
    ]


def crash(adapters: list[Adapter]) -> Trials:
    """One dress is enough: what is written is the same, as far as a crash goes."""
    return [
        (
            f"{adapter.name}-{verb}-{dress}",
            adapter.deviation(f"crash/{verb}", dress),
            (adapter, dress, verb),
        )
        for adapter in adapters
        for verb, dresses in (("encode", adapter.writes), ("apply", adapter.reads))
        for dress in [one for one in DRESSES if str(one) in dresses][:1]
    ]


def checking(adapters: list[Adapter]) -> Trials:
    return [
        (f"{adapter.name}-{case}", adapter.deviations.get(f"check/{case}"), (adapter, case))
        for adapter in adapters
        if adapter.check
        for case in MAY_BE_PUBLISHED | MAY_NOT
    ]


def large(adapters: list[Adapter]) -> Trials:
    """Every dialect; of its checksums the first that both know."""
    trials: dict[str, tuple[str, None, tuple[object, ...]]] = {}
    for encoder in adapters:
        for receiver in adapters:
            for dress in DRESSES:
                if str(dress) in encoder.writes & receiver.reads:
                    name = f"{encoder.name}-{receiver.name}-{dress.dialect}"
                    trials.setdefault(name, (name, None, (encoder, receiver, dress)))
    return [*trials.values()]


# The fixture a test asks for says what it tries.
TRIALS: dict[str, Callable[[list[Adapter]], Trials]] = {
    found.__name__: found for found in (receiving, encoding, interchange, checking, crash, large)
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for fixture in TRIALS.keys() & set(metafunc.fixturenames):
        trials = [
            pytest.param(
                values,
                id=name,
                marks=[pytest.mark.xfail(reason=reason, strict=True)] if reason else [],
            )
            for name, reason, values in TRIALS[fixture]([load(path) for path in ON_TRIAL])
        ]
        metafunc.parametrize(fixture, trials)
