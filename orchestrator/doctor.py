"""`layersweep doctor`: what this machine and the cluster are like, and how to mend what is not well."""

import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.attempt import PACKAGES

LOW_DISK_BYTES = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    state: str
    """`ok`, `note` (works, but know it) or `fail`."""
    found: str
    remedy: str = ""


def examine(address: str | None, store: str) -> list[Finding]:
    """Look at everything a sweep needs; never raises."""
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("python", _python),
        ("packages", _packages),
        ("store", lambda: _store(store)),
        ("devices", _devices),
        ("speech synthesis", _synthesis),
        ("ray", lambda: _ray(address)),
        ("hub", _hub),
    ]
    findings = []
    for what, check in checks:
        try:
            findings.append(check())
        except Exception as error:  # noqa: BLE001 - a check that breaks is itself a finding
            findings.append(Finding(what, "fail", f"{type(error).__name__}: {error}"))
    return findings


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    return Finding("python", "ok", found)


def _packages() -> Finding:
    missing, found = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(
            "packages", "fail", f"missing: {', '.join(missing)}", "run make .venv in the checkout"
        )
    return Finding("packages", "ok", ", ".join(found))


def _store(location: str) -> Finding:
    from orchestrator.store import StoreUnreachable, is_url, open_store
    from workers.errors import InvalidInput

    try:
        store = open_store(location)
        if is_url(location):
            store.write_note("doctor", {"at": time.time()})
    except InvalidInput as error:
        return Finding("store", "fail", error.problem, error.remedy)
    except StoreUnreachable as error:
        return Finding("store", "fail", str(error), "check the network and the endpoint")
    free = shutil.disk_usage(store.folder).free
    found = f"{store.location}, {free / 2**30:.0f} GiB free"
    if store.location != str(store.folder):
        found = f"{store.location}; its cache {store.folder}, {free / 2**30:.0f} GiB free"
    if free < LOW_DISK_BYTES:
        return Finding("store", "note", found, "large models need more: name a bigger disk")
    return Finding("store", "ok", found)


def _devices() -> Finding:
    import torch

    cores = os.cpu_count()
    if not torch.cuda.is_available():
        return Finding(
            "devices",
            "note",
            f"no GPU, {cores} CPU cores",
            "enough for the lab models; install a CUDA build of torch where there is a GPU",
        )
    names = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        names.append(f"{name} ({free / 2**30:.0f} of {total / 2**30:.0f} GiB free)")
    return Finding("devices", "ok", f"{', '.join(names)}; {cores} CPU cores")


def _synthesis() -> Finding:
    import espeakng_loader

    library = Path(espeakng_loader.get_library_path())
    if not library.is_file():
        return Finding(
            "speech synthesis", "fail", "eSpeak NG is missing", "reinstall espeakng-loader"
        )
    return Finding("speech synthesis", "ok", "eSpeak NG (for lab: data)")


def _ray(address: str | None) -> Finding:
    from cluster.connection import BadAddress, Cluster, ClusterUnreachable

    if address is not None and address.startswith("http"):
        return _jobs(address)
    try:
        with Cluster(address) as cluster:
            capacity = cluster.capacity()
    except (ClusterUnreachable, BadAddress) as error:
        return Finding(
            "ray", "fail", str(error), "check the address, and that RAY_AUTH_MODE is the same there"
        )
    where = address or "embedded"
    return Finding(
        "ray",
        "ok",
        f"{where}: {capacity.nodes} node(s), {capacity.cpus:g} CPUs, {capacity.gpus:g} GPUs",
    )


def _jobs(address: str) -> Finding:
    """What `submit` talks to."""
    from cluster.connection import BadAddress, ClusterUnreachable
    from cluster.jobs import Jobs, JobsError

    try:
        there = Jobs(address).version()
    except (ClusterUnreachable, BadAddress, JobsError) as error:
        return Finding(
            "ray",
            "fail",
            str(error),
            "check the address (the head's dashboard, mostly port 8265), and that its port is open "
            "to this machine",
        )
    return Finding("ray", "ok", f"{address}: takes jobs, Ray {there}")


def _hub() -> Finding:
    from huggingface_hub import HfApi

    try:
        HfApi().model_info("openai/whisper-tiny", timeout=5)
    except Exception as error:  # noqa: BLE001 - whatever the transport raises, it is unreachable
        return Finding(
            "hub",
            "note",
            f"not reachable ({type(error).__name__})",
            "local folders and lab: names work without it; gated models need `hf auth login`",
        )
    token = os.environ.get("HF_TOKEN") or (Path.home() / ".cache/huggingface/token").exists()
    return Finding("hub", "ok", "reachable, " + ("a token is set" if token else "no token set"))
