"""The two-node cluster of `cluster/local.sh`, with jobs from a checkout that is not installed there; the AWS file."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, environment
from ruamel.yaml import YAML

from raylway.launch import jobs

CLUSTER = REPOSITORY / "cluster"


def yaml(name: str) -> Any:
    return YAML(typ="safe", pure=True).load((CLUSTER / name).read_text())


def test_the_runtime_environment_is_stated_once() -> None:
    """`raylway submit` and plain `ray job submit` send the same."""
    stated = yaml("runtime-env.yaml")
    sent = jobs._runtime_env(REPOSITORY)
    assert [str(REPOSITORY / path) for path in stated["py_modules"]] == sent["py_modules"]
    assert stated["env_vars"] == sent["env_vars"]
    assert set(stated) | {"working_dir"} == set(sent)


def test_ray_accepts_the_aws_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml("aws.yaml"))
    validate_config(config)
    text = json.dumps(config)
    assert "ray-3.0.0.dev" not in text, "Ray's defaults would install a nightly wheel"
    assert "0.0.0.0" not in text
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = (command for command in config[key] if "ray start" in command)
        assert "RAY_AUTH_MODE=token ray start" in re.sub(r"RAY_(SERVE|JOB)\w+=\w+ ", "", start)
    assert config["provider"]["cache_stopped_nodes"] is False
    assert any("chmod 600 /home/ray/.ray/auth_token" in command for command in config["setup_commands"])
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]


EC2 = {
    "InstanceType": str,
    "InstanceMarketOptions": {"MarketType": str},
    "BlockDeviceMappings": [{"DeviceName": str, "Ebs": {"VolumeSize": int, "VolumeType": str}}],
}
"""The keys of EC2's RunInstances that we use; Ray passes them on unchecked, and EC2 would be the first to complain."""


def misfit(value: Any, shape: Any) -> str:
    """Where a value differs from a shape; empty if nowhere."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return "not a mapping"
        return "; ".join(
            f"{key}: {found}"
            for key in value
            if (found := misfit(value[key], shape[key]) if key in shape else "unknown key")
        )
    if isinstance(shape, list):
        return "; ".join(filter(None, (misfit(each, shape[0]) for each in value)))
    return "" if type(value) is shape else f"expected {shape.__name__}"


def test_the_aws_file_uses_ec2s_names() -> None:
    assert misfit({"InstanceTyp": "x"}, EC2) == "InstanceTyp: unknown key"
    kinds = yaml("aws.yaml")["available_node_types"]
    assert {name: misfit(kind["node_config"], EC2) for name, kind in kinds.items()} == dict.fromkeys(kinds, "")
    gpu = [kind for kind in kinds.values() if kind["resources"].get("GPU")]
    assert gpu
    for kind in gpu:
        assert kind["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


TABLE = """
import time
from pathlib import Path

import pandas as pd

import raylway


def rows():
    print("Raylway comes from", raylway.__file__, flush=True)
    return pd.DataFrame({"x": range(400), "y": [value > 199 for value in range(400)]})


def rows_that_never_come():
    print("waiting", flush=True)
    time.sleep(600)
"""


@dataclass
class Cluster:
    url: str
    gcs: str
    checkout: Path
    python: Path
    """Of an environment that has everything but Raylway; the cluster runs on it."""

    def command(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        """A Python process in the checkout that knows the cluster's address."""
        return subprocess.Popen(
            [str(self.python), *arguments],
            cwd=self.checkout,
            env=self.environment() | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def environment(self) -> dict[str, str]:
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        return environment() | {"RAY_API_SERVER_ADDRESS": self.url, "RAY_AUTH_MODE": "token", "PATH": path}

    def submit(self, *arguments: str, **extra: str) -> subprocess.Popen[str]:
        """`raylway submit ARGUMENTS`, run from the checkout's own source."""
        return self.command("-m", "raylway", "submit", *arguments, PYTHONPATH="platform:.", **extra)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    python = environment_without_raylway(folder / "env")
    checkout = folder / "checkout"
    for name in ("platform", "serve_app", "cluster"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    (checkout / "jobs").mkdir()
    (checkout / "jobs" / "table.py").write_text(TABLE)
    job = {"name": "small", "data": {"source": "python://table:rows", "target": "y"}, "train": {"for": "2 epochs"}}
    (checkout / "jobs" / "small.yaml").write_text(json.dumps(job))
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = {"PORT": str(one.getsockname()[1]), "DASHBOARD_PORT": str(two.getsockname()[1])}
    started = subprocess.Popen(
        [str(CLUSTER / "local.sh")],
        env=environment() | ports | {"RAY": str(python.parent / "ray"), "MARK": folder.name},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert started.stdout is not None
        said = ""
        while "Ctrl-C here" not in said:
            line = started.stdout.readline()
            assert line, said
            said += line
        url = f"http://127.0.0.1:{ports['DASHBOARD_PORT']}"
        assert url in said
        yield Cluster(url, f"127.0.0.1:{ports['PORT']}", checkout, python)
    finally:
        started.send_signal(signal.SIGINT)
        assert started.wait(60) == 130


def environment_without_raylway(folder: Path) -> Path:
    """A virtual environment that sees every installed package but ours; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "raylway" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    ray = folder / "bin" / "ray"
    ray.write_text(f"#!{python}\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)
    assert subprocess.run([python, "-c", "import raylway"], capture_output=True, check=False, cwd="/").returncode == 1
    return python


def test_a_plain_ray_job_runs_where_raylway_is_not_installed(cluster: Cluster, tmp_path: Path) -> None:
    ray = str(cluster.python.parent / "ray")
    runtime = ["--working-dir", ".", "--runtime-env", "cluster/runtime-env.yaml"]
    entry = ["python", "-m", "raylway", "run", "jobs/small.yaml", "--set", f"storage={tmp_path}"]
    log, errors = (job := cluster.command(ray, "job", "submit", *runtime, "--", *entry)).communicate(timeout=280)
    assert job.returncode == 0, log + errors
    assert re.search(r"Raylway comes from \S+/py_modules_files/\S+/raylway/__init__.py", log)
    assert re.search(r"joined \S+: 2 nodes, 2 CPUs, 0 GPUs", log)
    (run,) = (tmp_path / "small").iterdir()
    assert (run / "bundle" / "bundle.json").exists()
    assert (run / "report.html").exists()

    # The same command, through our own submit: the run is there and nothing is left to do.
    said, errors = (again := cluster.submit("jobs/small.yaml", "--set", f"storage={tmp_path}")).communicate(timeout=120)
    assert again.returncode == 0, said + errors
    assert said.count("is finished; nothing to do") == 1
    assert re.search(r"submitted raysubmit_\w+ to http://127\.0\.0\.1:\d+\n(.*\n)*raysubmit_\w+ succeeded", errors)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.target=nope", "nope"),
        ("train.workers=3", "3 workers of 1 CPU each can never run at once here"),
    ],
)
def test_the_users_mistake_comes_back_as_exit_code_2(
    cluster: Cluster, tmp_path: Path, override: str, sentence: str
) -> None:
    job = cluster.submit("jobs/small.yaml", "--set", f"storage={tmp_path}", "--set", override)
    log, errors = job.communicate(timeout=120)
    assert job.returncode == 2, log + errors
    assert sentence in log
    assert "Traceback" not in log
    assert re.search(r"raysubmit_\w+ failed: ", errors)


def test_a_job_goes_on_without_its_submitter_and_a_stopped_job_is_no_success(cluster: Cluster, tmp_path: Path) -> None:
    slow = (
        "jobs/small.yaml",
        "--set",
        f"storage={tmp_path}",
        "--set",
        "data.source=python://table:rows_that_never_come",
    )
    job = cluster.submit(*slow)
    assert job.stdout is not None
    assert job.stderr is not None
    while "waiting" not in job.stdout.readline():
        assert job.poll() is None
    job.send_signal(signal.SIGINT)
    errors = job.communicate(timeout=60)[1]
    assert job.returncode == 130
    (job_id,) = set(re.findall(r"raysubmit_\w+", errors))
    assert f"stop it:  ray job stop --address {cluster.url} {job_id}" in errors

    ray = str(cluster.python.parent / "ray")
    status = cluster.command(ray, "job", "status", job_id).communicate(timeout=60)
    assert "RUNNING" in "".join(status)
    follow = (
        "import asyncio, sys; from raylway.launch import auth, jobs; url = sys.argv[1]; auth.prepare_to_join(url)\n"
    )
    follow += "sys.exit(asyncio.run(jobs._Follower(jobs._connect(url), sys.argv[2]).follow()))"
    follower = cluster.command("-c", follow, cluster.url, job_id, PYTHONPATH="platform:.")
    assert cluster.command(ray, "job", "stop", job_id).wait(60) == 0
    log, errors = follower.communicate(timeout=60)
    assert follower.returncode == 1
    assert (log.count("waiting"), errors) == (1, f"{job_id} was stopped\n")


def test_a_wrong_token_is_one_sentence(cluster: Cluster) -> None:
    job = cluster.submit("jobs/small.yaml", RAY_AUTH_TOKEN="0" * 64)
    log, errors = job.communicate(timeout=60)
    assert (job.returncode, log) == (2, "")
    assert f"error: {cluster.url}: the cluster refuses this token\n  found: the token of RAY_AUTH_TOKEN" in errors
    direct = cluster.command(
        "-m",
        "raylway",
        "run",
        "jobs/small.yaml",
        PYTHONPATH="platform:.",
        RAY_ADDRESS=cluster.gcs,
        RAY_AUTH_TOKEN="0" * 64,
    )
    errors = direct.communicate(timeout=60)[1]
    assert direct.returncode == 2
    assert f"error: {cluster.gcs}: the cluster refuses this token" in errors


def test_workers_of_every_node_find_the_packages_and_the_users_modules(cluster: Cluster) -> None:
    code = """
import os
from raylway.launch import start
from raylway.runs.progress import Reporter
with start.connect(Reporter(), [os.path.abspath("jobs")]):
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
    @ray.remote
    def look():
        import raylway, serve_app, table
        return raylway.__file__
    on = [On(node["NodeID"], soft=False) for node in ray.nodes()]
    print(*{ray.get(look.options(scheduling_strategy=node).remote()) for node in on})
"""
    job = cluster.command("-c", code, PYTHONPATH="platform:.", RAY_ADDRESS=cluster.gcs)
    said, errors = job.communicate(timeout=60)
    assert job.returncode == 0, errors
    assert len(said.split()) == 2
    assert all("py_modules_files" in place for place in said.split())
