"""Where a cycle keeps its own files on this machine, below the spec's `work_dir`.

<work_dir>/<account>/<deployment>/baseline/<identity>/   full bytes of the served snapshot
<work_dir>/<account>/<deployment>/deltas/<identity>/     encoded shards on their way
<work_dir>/<account>/<deployment>/results/               results of finished steps
"""

from pathlib import Path

from hotload.clients.service import HotLoadClient
from hotload.spec import CycleSpec


def service_dir(spec: CycleSpec, service: HotLoadClient) -> Path:
    """Everything this machine keeps for one service; two services never share a file."""
    return Path(spec.work_dir) / service.account_id / service.deployment_id


def baseline_dir(spec: CycleSpec, service: HotLoadClient) -> Path:
    """Parent of the baselines, one directory per identity, complete whenever visible."""
    return service_dir(spec, service) / "baseline"


def delta_dir(spec: CycleSpec, service: HotLoadClient) -> Path:
    """Parent of the encoded deltas, one directory per identity."""
    return service_dir(spec, service) / "deltas"


def results_dir(spec: CycleSpec, service: HotLoadClient) -> Path:
    """Cached task results; each names an artifact that is checked before it is believed."""
    return service_dir(spec, service) / "results"
