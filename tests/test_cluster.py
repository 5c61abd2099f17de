"""The two-node cluster of `cluster/local.sh`: jobs from a checkout that is installed nowhere on it; and the AWS file."""

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
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import REPOSITORY, environment
from ruamel.yaml import YAML

from raylway.launch import jobs, worker_setup

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


@dataclass
class Cluster:
    url: str
    gcs: str
    checkout: Path
    python: Path
    """Of an environment that has everything but Raylway; the cluster runs on it."""

    def command(self, *arguments: str, **extra: str) -> list[str] | Any:
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

    def submit(self, *arguments: str) -> Any:
        """`raylway submit ARGUMENTS`, run from the checkout's own source."""
        return self.command("-m", "raylway", "submit", *arguments, PYTHONPATH="platform:.")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    python = environment_without_raylway(folder / "env")
    checkout = folder / "checkout"
    for name in ("platform", "serve_app", "cluster"):
        shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = {"PORT": free_port_for_ray(), "DASHBOARD_PORT": str(two.getsockname()[1])}
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
