"""What starts Layersweep on clusters: `slurm.sbatch` really runs, on two nodes that are this machine.

SLURM's own commands are small scripts here. Ray is real where a test is about Ray.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import jsonschema
import psutil
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "cluster" / "launch"
NODE_PORTS = 300

# --- SLURM ---------------------------------------------------------------------------------

SCONTROL = """
    if [ "$1" = show ]; then printf 'node-a\\nnode-b\\n'; else echo "scontrol $*" >>"$CALLS"; fi
"""
SQUEUE = """
    echo "$STATE"
"""
# SIGTERM reaches what it runs, as with SLURM's. Two machines may use the same ports; both nodes are
# this machine, so the second one gets others.
SRUN = f"""
    echo "srun $*" >>"$CALLS"
    case "$*" in *--nodelist=node-b*) PORTS=$((PORTS + {NODE_PORTS})) ;; esac
    while [[ "$1" == --* ]]; do shift; done
    exec "$@"
"""
FAKE_RAY = """
    import signal, socket, sys, time

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ports = [int(option[7:]) for option in sys.argv if option.startswith("--port=")]
    listening = [socket.create_server(("127.0.0.1", port)) for port in ports]
    time.sleep(300)
"""
DRIVER = """
    import signal, sys, time
    from pathlib import Path

    here = Path(sys.argv[0]).parents[2]

    def left(*_):
        print("checkpoint kept", flush=True)
        sys.exit(130)
"""
WORKS_UNTIL_TOLD = (
    DRIVER
    + """
    import ray

    ray.init(sys.argv[sys.argv.index("--address") + 1], log_to_driver=False)
    signal.signal(signal.SIGTERM, left)

    @ray.remote(num_cpus=1)
    def node():
        time.sleep(1)
        return ray.get_runtime_context().get_node_id()

    used = len(set(ray.get([node.remote(), node.remote()])))
    ports = sorted(node["NodeManagerPort"] for node in ray.nodes())
    (here / "new").write_text(f"{used} {ports}")
    (here / "new").rename(here / "driving")
    time.sleep(300)
"""
)
WAITS_UNTIL_TOLD = (
    DRIVER
    + """
    signal.signal(signal.SIGTERM, left)
    (here / "driving").touch()
    time.sleep(300)
"""
)


def executable(path, text, interpreter="/usr/bin/env bash"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{textwrap.dedent(text)}", encoding="utf-8")
    path.chmod(0o755)


def listeners(first):
    """Who listens on the ports of the job that begin with `first`."""
    return [
        connection
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and first <= connection.laddr.port < first + 2 * NODE_PORTS
    ]


def free_ports():
    """A first port as the script might choose it, beside whatever runs on this machine now."""
    slots = [11000 + (os.getpid() + i) % 68 * NODE_PORTS for i in range(68)]
    return next(first for first in slots if not listeners(first))


class Job:
    """A run of `slurm.sbatch`, in a session of its own."""

    def __init__(self, folder, driver, ray=None, **environment):
        self.folder, self.scratch = folder, Path(tempfile.mkdtemp(prefix="ls-", dir="/tmp"))
        for name, text in {"scontrol": SCONTROL, "squeue": SQUEUE, "srun": SRUN}.items():
            executable(folder / "bin" / name, text)
        venv = folder / "venv" / "bin"
        executable(venv / "layersweep", driver, sys.executable)
        if ray is None:
            executable(venv / "ray", f'exec {Path(sys.executable).with_name("ray")} "$@"\n')
            executable(venv / "python", f'exec {sys.executable} "$@"\n')
        else:
            executable(venv / "ray", ray, sys.executable)
            executable(venv / "python", "exit 0\n")
        self.ports = free_ports()
        mine = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(folder / "calls"),
            "STATE": "RUNNING",
            "SLURM_JOB_ID": "4242",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_CPUS_PER_TASK": "1",
            "HEAD_IP": "127.0.0.1",
            "PORTS": str(self.ports),
            "SWEEP": "mine.yaml",
            "STORE": "/data/store",
            "VENV": str(folder / "venv"),
            "SCRATCH": str(self.scratch),
        }
        with (folder / "out").open("w") as out:
            self.process = subprocess.Popen(
                ["bash", LAUNCH / "slurm.sbatch", "--set", "seed=1"],
                cwd=folder,
                env=os.environ | mine | environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, name):
        """What the driver wrote into the file, once it is there."""
        for _ in range(2400):
            if (self.folder / name).exists():
                return (self.folder / name).read_text()
            assert self.process.poll() is None, self.said()
            time.sleep(0.1)
        raise AssertionError(self.said())

    def terminate(self):
        """As SLURM does it with --signal=B:TERM: the script alone."""
        os.kill(self.process.pid, signal.SIGTERM)

    def status(self):
        return self.process.wait(60)

    def said(self):
        files = [self.folder / "out", *self.folder.glob("*-ray.out")]
        return "\n".join(file.read_text() for file in files if file.exists())

    def calls(self):
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def requeued(self):
        return "scontrol requeue 4242" in self.calls()

    def processes(self):
        found = [connection.pid for connection in listeners(self.ports)]
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == self.process.pid:
                    found.append(pid)
            except ProcessLookupError:
                continue
        return found

    def end(self):
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(10)
        shutil.rmtree(self.scratch, ignore_errors=True)


@pytest.fixture
def submit(tmp_path):
    jobs = []

    def start(driver, **options):
        jobs.append(Job(tmp_path, driver, **options))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def stranger_is_refused(port):
    """Whether Ray's head sends away who has a token, but not the job's."""
    answer = subprocess.run(
        [Path(sys.executable).with_name("ray"), "health-check", "--address", f"127.0.0.1:{port}"],
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.returncode != 0 and "InvalidAuthToken" in answer.stderr


def test_a_preempted_job_keeps_its_checkpoints_leaves_no_process_and_is_requeued(submit):
    job = submit(WORKS_UNTIL_TOLD)
    used, _, ports = job.wait_for("driving").partition(" ")
    assert used == "2", "both nodes work"
    assert json.loads(ports) == [job.ports + 1, job.ports + NODE_PORTS + 1]
    assert stranger_is_refused(job.ports)
    job.terminate()
    assert job.status() == 130
    assert "checkpoint kept" in job.said()
    assert job.requeued()
    assert job.processes() == []
    assert list(job.scratch.iterdir()) == []


def test_the_driver_is_told_sweep_address_store_and_the_options(submit):
    job = submit(DRIVER + '    (here / "told").write_text(" ".join(sys.argv[1:]))\n', ray=FAKE_RAY)
    assert job.status() == 0, job.said()
    assert job.wait_for("told") == (
        f"run mine.yaml --address 127.0.0.1:{job.ports} --store /data/store --set seed=1"
    )
    nodes = [call.split("--nodelist=")[1].split()[0] for call in job.calls()]
    assert nodes == ["node-a", "node-b"]


@pytest.mark.parametrize("status", [0, 1, 3])
def test_the_job_ends_as_the_driver_did(submit, status):
    job = submit(f"raise SystemExit({status})\n", ray=FAKE_RAY)
    assert job.status() == status, job.said()
    assert not job.requeued()
    assert job.processes() == []


def test_a_sweep_that_was_done_when_the_signal_came_is_not_requeued(submit):
    job = submit(WAITS_UNTIL_TOLD.replace("sys.exit(130)", "sys.exit(0)"), ray=FAKE_RAY)
    job.wait_for("driving")
    job.terminate()
    assert job.status() == 0
    assert not job.requeued()


@pytest.mark.parametrize(
    "environment", [{"STATE": "COMPLETING"}, {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}]
)
def test_a_job_that_was_cancelled_or_requeued_too_often_is_not_requeued(submit, environment):
    job = submit(WAITS_UNTIL_TOLD, ray=FAKE_RAY, **environment)
    job.wait_for("driving")
    job.terminate()
    assert job.status() == 130
    assert "checkpoint kept" in job.said()
    assert not job.requeued()


def test_a_job_that_is_preempted_while_ray_starts_runs_no_driver_and_is_requeued(submit):
    job = submit("raise SystemExit(1)\n", ray="import time\ntime.sleep(300)\n")
    job.wait_for("calls")
    job.terminate()
    assert job.status() == 130
    assert job.requeued()
    assert job.processes() == []


def test_a_head_that_does_not_start_is_named_with_the_place_of_the_reason(submit):
    job = submit("raise SystemExit(0)\n", ray="raise SystemExit('no such option')\n")
    assert job.status() == 1
    assert "Ray did not start on node-a; the reason is in" in job.said()
    assert "no such option" in job.said()


def test_a_sweep_must_be_named(submit):
    job = submit("raise SystemExit(0)\n", ray=FAKE_RAY, SWEEP="")
    assert job.status() != 0
    assert "SWEEP=mine.yaml sbatch slurm.sbatch" in job.said()


def test_jobs_with_neighbouring_numbers_share_no_port(submit):
    first = []
    for number in ("1000069", "1000070"):
        job = submit(DRIVER, ray=FAKE_RAY, PORTS="", SLURM_JOB_ID=number)
        assert job.status() == 0, job.said()
        head = next(call for call in reversed(job.calls()) if " --head " in call)
        first.append(int(head.split(" --port=")[1].split()[0]))
    assert abs(first[0] - first[1]) >= NODE_PORTS
    assert all(1024 < port < 32768 - NODE_PORTS for port in first), "below the ephemeral ports"


def test_the_script_passes_shellcheck():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    answer = subprocess.run(
        [shellcheck, LAUNCH / "slurm.sbatch"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout


# --- Kubernetes ----------------------------------------------------------------------------


def kubernetes():
    text = (LAUNCH / "kuberay.yaml").read_text(encoding="utf-8")
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def problems(document):
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text("utf-8"))
    chosen = {"$ref": f"#/$defs/{document['kind']}", "$defs": schema["$defs"]}
    errors = jsonschema.Draft202012Validator(chosen).iter_errors(document)
    return [f"{error.json_path}: {error.message}" for error in errors]


@pytest.mark.parametrize("kind", ["PersistentVolumeClaim", "RayJob"])
def test_the_kubernetes_file_is_as_the_schemas_want_it(kind):
    assert problems(kubernetes()[kind]) == []


def test_the_schema_would_find_a_misspelt_field_and_a_wrong_type():
    job = kubernetes()["RayJob"]
    job["spec"]["backofLimit"] = 0
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"] = "8"
    assert len(problems(job)) == 2


def test_the_kubernetes_job_is_bounded_protected_and_on_the_same_ray():
    spec = kubernetes()["RayJob"]["spec"]
    cluster = spec["rayClusterSpec"]
    lock = (LAUNCH.parents[1] / "requirements.lock").read_text(encoding="utf-8")
    assert f"\nray=={cluster['rayVersion']}\n" in lock
    assert cluster["authOptions"] == {"mode": "token"}
    assert (spec["backoffLimit"], spec["shutdownAfterJobFinishes"]) == (0, True)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes


# --- cloud ---------------------------------------------------------------------------------


def test_the_cloud_file_passes_rays_own_validation():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((LAUNCH / "cloud.yaml").read_text(encoding="utf-8"))
    complete = prepare_config(config)
    validate_config(complete)
    head, workers = complete["available_node_types"].values()
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert workers["min_workers"] <= workers["max_workers"] <= complete["max_workers"]


def test_nobody_without_the_token_may_join_in_the_cloud():
    config = yaml.safe_load((LAUNCH / "cloud.yaml").read_text(encoding="utf-8"))
    starts = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in starts if "ray start" in line)
    assert "~/.ray/auth_token" in config["file_mounts"]
