"""Renders the page of a run: what became of its policy versions, and the chain that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from hotload.identity import SnapshotKind, read_identity
from hotload.publish.snapshot import SnapshotManifest
from hotload.quantities import duration, number, percent, plural, size, version_words
from hotload.report.chart_shapes import Dot, Line, curves, dots, layers
from hotload.report.page_parts import Fact, Section
from hotload.report.run_history import RunHistory, RunVersion
from hotload.report.templating import render

ROWS_SHOWN = 200
FALLBACKS_SHOWN = 5
TONES = {SnapshotKind.DELTA: "main", SnapshotKind.FULL: "third", SnapshotKind.LORA: "fourth"}
NAMES = {SnapshotKind.DELTA: "delta", SnapshotKind.FULL: "full", SnapshotKind.LORA: "adapter"}


@dataclass(frozen=True, slots=True)
class Link:
    """A published snapshot in its chain: the first one that is known, and how many deltas it is
    after the full one, `None` where that one is not known.
    """

    anchor: str
    length: int | None


def links(versions: Iterable[RunVersion]) -> dict[str, Link]:
    """Chain the published snapshots of a run by identity, given in the order of publication."""
    chained: dict[str, Link] = {}
    for row in versions:
        if row.outcome == "not due":
            continue
        words = version_words(row.policy_version, row.line)
        before = chained.get(row.previous or "")
        if row.kind is not SnapshotKind.DELTA:
            link = Link(words, 0)
        elif before is None:
            link = Link(words, None)
        else:
            link = Link(before.anchor, None if before.length is None else before.length + 1)
        chained[row.identity] = link
    return chained


def render_run(history: RunHistory, unfinished: Sequence[SnapshotManifest] = ()) -> str:
    """Render the page of a run, as the text of an HTML file.

    Args:
        history: has at least one version.
        unfinished: snapshots of later versions, whose cycles have not ended.
    """
    versions, last = history.standing, history.versions[-1]
    chained = links(history.versions)
    named = read_identity(last.identity)
    served_name = last.identity
    if named and named.run_id == history.run_id:
        served_name = f"version {version_words(named.policy_version, named.line)}"
    fallbacks = [row for row in versions if row.outcome == "fell back"]
    sections = [
        _rewards(versions),
        _bytes(versions),
        _failures(versions),
        _drift(versions),
    ]
    return render(
        "run.html.jinja",
        run_id=history.run_id,
        last=last,
        chained=chained,
        served=chained.get(last.identity),
        served_name=served_name,
        facts=_facts(history.versions),
        warnings=[
            f"Version {row.policy_version} fell back to a full snapshot: "
            f"{row.fallback_reason or 'no reason is recorded'}"
            for row in fallbacks[: -FALLBACKS_SHOWN - 1 : -1]
        ],
        more_fallbacks=max(len(fallbacks) - FALLBACKS_SHOWN, 0),
        stages=_stages(versions),
        sections=[section for section in sections if section],
        unfinished=sorted(unfinished, key=lambda one: one.created_at, reverse=True),
        rows=history.versions[: -ROWS_SHOWN - 1 : -1],
        older_count=max(len(history.versions) - ROWS_SHOWN, 0),
        standing=frozenset(row.order for row in versions),
        names=NAMES,
    )


def _facts(versions: Sequence[RunVersion]) -> list[Fact]:
    last, published = versions[-1], [row for row in versions if row.outcome != "not due"]
    sent = sum(row.size_bytes for row in published)
    content = sum(row.content_size_bytes for row in published)
    fallback_count = sum(row.outcome == "fell back" for row in versions)
    failed = sum(row.failed_sample_count for row in versions)
    samples = sum(row.sample_count for row in versions)
    spread = "" if last.reward_std is None else f"± {number(last.reward_std)}"
    typical = median(row.seconds for row in versions)
    return [
        Fact("versions", f"{len(versions):,}", f"{len(published):,} published"),
        Fact(
            "last mean reward",
            "–" if last.mean_reward is None else number(last.mean_reward),
            spread,
        ),
        Fact("sent", size(sent), f"of {size(content)} in checkpoints"),
        Fact("median cycle", duration(typical), f"last {duration(last.seconds)}"),
        Fact(
            "fallbacks",
            f"{fallback_count:,}",
            f"{percent(fallback_count, len(published))} of the published",
            is_bad=fallback_count > 0,
        ),
        Fact("without a reward", percent(failed, samples), f"of {plural(samples, 'sample')}"),
    ]


def _numbers(versions: Sequence[RunVersion]) -> list[int]:
    return [row.policy_version for row in versions]


def _rewards(versions: Sequence[RunVersion]) -> Section | None:
    means = [row.mean_reward for row in versions]
    if not any(mean is not None for mean in means):
        return None
    line = Line(means, "main", [row.reward_std for row in versions])
    return Section(
        "Reward",
        "Mean of a version's samples, and one standard deviation to both sides",
        curves(_numbers(versions), [line], "Mean reward by policy version", number),
    )


def _stages(versions: Sequence[RunVersion]) -> Section:
    stages: dict[str, tuple[str, Callable[[RunVersion], float]]] = {
        "encode and upload": ("main", lambda row: row.publish_seconds + row.signal_seconds),
        "replicas converge": ("second", lambda row: row.converge_seconds),
        "roll out and score": ("third", lambda row: row.rollout_seconds),
        "check, plan, wait": ("fifth", _other_seconds),
    }
    return Section(
        "Where the time went",
        "Seconds of a version's cycle by stage",
        layers(
            _numbers(versions),
            {tone: [spent(row) for row in versions] for tone, spent in stages.values()},
            "Seconds by stage and policy version",
            duration,
        ),
        legend=tuple((tone, name) for name, (tone, _) in stages.items()),
    )


def _other_seconds(row: RunVersion) -> float:
    named = row.publish_seconds + row.signal_seconds + row.converge_seconds + row.rollout_seconds
    return max(row.seconds - named, 0.0)


def _bytes(versions: Sequence[RunVersion]) -> Section | None:
    sent: list[Dot | None] = []
    kinds: dict[str, str] = {}
    for row in versions:
        if row.outcome == "not due" or not row.size_bytes:
            sent.append(None)
            continue
        fell_back = row.outcome == "fell back"
        tone = "warn" if fell_back else TONES[row.kind]
        name = f"{NAMES[row.kind]} after a fallback" if fell_back else NAMES[row.kind]
        kinds[tone] = name
        sent.append(Dot(row.size_bytes, f"version {row.policy_version}, {name}", tone))
    if not kinds:
        return None
    return Section(
        "Bytes sent",
        "By kind of snapshot; every line is a power of ten",
        dots(_numbers(versions), sent, "Bytes sent by policy version", size),
        legend=tuple(kinds.items()),
    )


def _failures(versions: Sequence[RunVersion]) -> Section | None:
    samples = [_share(row.failed_sample_count, row.sample_count) for row in versions]
    requests = [_share(row.failed_request_count, row.request_count) for row in versions]
    if not any(samples) and not any(requests):
        return None
    return Section(
        "Failures",
        "Samples without a reward, and requests that were sent again or given up, of all",
        curves(
            _numbers(versions),
            [Line(requests, "fifth"), Line(samples, "warn")],
            "Share of failed samples and requests by policy version",
            lambda share: f"{100 * share:.3g} %",
            low=0,
        ),
        legend=(("warn", "samples"), ("fifth", "requests")),
    )


def _share(part: int, whole: int) -> float | None:
    return min(part / whole, 1.0) if whole else None


def _drift(versions: Sequence[RunVersion]) -> Section | None:
    # A cycle may report the drift of the version before; the later report has seen more tokens.
    by_version = {row.drift_version: row.drift_k3 for row in versions if row.drift_k3 is not None}
    values = [by_version.get(row.policy_version) for row in versions]
    if not any(value is not None for value in values):
        return None
    return Section(
        "Trainer against sampler",
        "k3 of the log-probabilities of a version's tokens, in nats: 0 where the policies agree",
        curves(
            _numbers(versions),
            [Line(values, "second")],
            "Drift k3 by policy version",
            number,
            low=0,
        ),
    )
