"""The files of deploy/ and the commands of docs/pods.md, checked without a cluster.

The schema below is ours: the fields of JobSet v1alpha2, Job v1 and Pod v1 that the manifest uses, with
their types. It is strict, so a misspelt field fails here, and a new one has to be added on purpose.
"""

import importlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs import default

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "deploy" / "slurm.sbatch"
JOBSET = ROOT / "deploy" / "jobset.yaml"
PODS = ROOT / "docs" / "pods.md"

OTHER_PROGRAMS_FLAGS = {
    *("zone", "accelerator-type", "version", "recurse", "worker", "command"),  # gcloud
    *("kill-on-bad-exit",),  # srun
    *("job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"),  # sbatch
    *("time", "signal", "requeue", "open-mode", "output"),
}

POD: dict[str, Any] = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "containers": [
        {
            "name": str,
            "image": str,
            "workingDir": str,
            "env": [{"name": str, "value": str}],
            "command": [str],
            "ports": [{"containerPort": int}],
            "resources": {"limits": {"nvidia.com/gpu": int}},
            "volumeMounts": [{"name": str, "mountPath": str}],
        }
    ],
    "volumes": [
        {
            "name": str,
            "persistentVolumeClaim?": {"claimName": str},
            "emptyDir?": {"medium": str},
        }
    ],
}
SCHEMA: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "network": {
            "enableDNSHostnames": bool,
            "subdomain": str,
            "publishNotReadyAddresses": bool,
        },
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "completionMode": str,
                        "completions": int,
                        "parallelism": int,
                        "backoffLimit": int,
                        "template": {"spec": POD},
                    }
                },
            }
        ],
    },
}


def schema_errors(value: Any, schema: Any, path: str = "") -> list[str]:
    """Departures from a schema: `{key: schema}` (`key?` is optional), `[schema]`, or a type."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: expected a mapping, got {value!r}"]
        fields = {key.removesuffix("?"): one for key, one in schema.items()}
        errors = [f"{path}.{key}: unknown" for key in value.keys() - fields.keys()]
        errors += [
            f"{path}.{key}: missing" for key in schema.keys() - value.keys() if key[-1] != "?"
        ]
        for key in value.keys() & fields.keys():
            errors += schema_errors(value[key], fields[key], f"{path}.{key}")
        return errors
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{path}: expected a list that is not empty, got {value!r}"]
        return [
            error
            for index, one in enumerate(value)
            for error in schema_errors(one, schema[0], f"{path}[{index}]")
        ]
    # Exactly the type: a bool is not an int, and an unquoted number is no value of a variable.
    return [] if type(value) is schema else [f"{path}: expected {schema.__name__}, got {value!r}"]


def manifest() -> Any:
    return yaml.safe_load(JOBSET.read_text())


def job_and_container(value: Any) -> tuple[Any, Any]:
    (workers,) = value["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return job, container


def test_jobset_has_known_fields_of_the_right_types():
    assert schema_errors(manifest(), SCHEMA) == []


def test_schema_is_strict():
    value = manifest()
    job, container = job_and_container(value)
    job["completion"] = job.pop("completions")
    container["env"][0]["value"] = 4
    value["spec"]["network"]["enableDNSHostnames"] = 1
    errors = schema_errors(value, SCHEMA)
    assert len(errors) == 4
    for part in (
        "completion: unknown",
        "completions: missing",
        "env[0].value",
        "enableDNSHostnames",
    ):
        assert any(part in error for error in errors)


def test_fields_of_the_jobset_agree():
    value = manifest()
    job, container = job_and_container(value)
    (workers,) = value["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]
    env = {one["name"]: one["value"] for one in container["env"]}
    assert (value["apiVersion"], value["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(env["NUM_PROCESSES"])
    assert workers["replicas"] == 1  # two jobs would each have an index 0
    host, port = env["COORDINATOR"].split(":")
    subdomain = value["spec"]["network"]["subdomain"]
    # JobSet names a pod JOBSET-JOB-REPLICA-INDEX.
    assert host == f"{value['metadata']['name']}-{workers['name']}-0-0.{subdomain}"
    assert int(port) in {one["containerPort"] for one in container["ports"]}
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["terminationGracePeriodSeconds"] > 30  # Kubernetes' own
    mounts = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert mounts.keys() == {one["name"] for one in pod["volumes"]}
    shared = {mounts[one["name"]] + "/" for one in pod["volumes"] if "persistentVolumeClaim" in one}
    for name in ("WORKDIR", "JAX_COMPILATION_CACHE_DIR"):
        assert env[name].startswith(tuple(shared))
    variables = set(re.findall(r"\$\{?([A-Z][A-Z_]+)", container["command"][-1]))
    assert variables - {"JOB_COMPLETION_INDEX"} <= env.keys()


def scripts() -> dict[str, str]:
    _, container = job_and_container(manifest())
    return {"slurm.sbatch": SBATCH.read_text(), "jobset.yaml": container["command"][-1]}


@pytest.mark.parametrize("name", scripts())
def test_shell_parses(name):
    subprocess.run(["bash", "-n"], input=scripts()[name], text=True, check=True)


@pytest.mark.parametrize("name", scripts())
def test_shellcheck_finds_nothing(name):
    command = [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "-"]
    subprocess.run(command, input=scripts()[name], text=True, check=True)


@pytest.mark.parametrize("path", [SBATCH, JOBSET, PODS], ids=lambda path: path.name)
def test_flags_and_configs_exist(path):
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    defined = {
        flag
        for path in (ROOT / "jevb_jax/command_line").glob("*.py")
        for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', path.read_text())
    }
    keys: set[str] = set()
    config: Any = default.get_config()
    for section, values in config.to_dict().items():
        keys |= {f"config.{section}.{key}" for key in values} if isinstance(values, dict) else set()
    scaling = (ROOT / "benchmarks" / "scaling_model.py").read_text()
    ours = defined | keys
    pattern = r"(?<![\w-])--([a-z][\w.-]*)"
    for line in text.splitlines():
        before, script, after = line.partition("train.py")
        if script:
            assert set(re.findall(pattern, after)) <= ours, line
        elif "benchmarks.scaling_model" in line:
            options = set(re.findall(r'"--(\w+)"', scaling))
            assert set(re.findall(pattern, line)) <= options, line
            continue
        assert set(re.findall(pattern, before)) <= ours | OTHER_PROGRAMS_FLAGS, line
    for file, argument in re.findall(r"--config=(configs/\w+\.py)(?::(\w+))?", text):
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        module.get_config(*[argument] if argument else [])
    for setting in re.findall(r"`((?:train|model|optimizer|input|data|checkpoint)\.\w+)`", text):
        assert f"config.{setting}" in keys, setting
    for link in re.findall(r"\]\(([^)#:]+)\)", text if path == PODS else ""):
        assert (path.parent / link).exists(), link


def stub(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def environment(tmp_path: Path, **values: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **values}


@pytest.mark.parametrize(
    ("task", "status", "is_requeued"),
    [("touch $WORKDIR/results.json", 0, False), ("true", 0, True), ("exit 3", 3, False)],
    ids=["finished", "stopped by SIGTERM", "failed"],
)
def test_slurm_queues_again_what_was_stopped(tmp_path, task, status, is_requeued):
    stub(tmp_path, "srun", task)
    stub(tmp_path, "scontrol", f"echo $@ > {tmp_path}/scontrol.txt")
    given = {"WORKDIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8"}
    values = environment(tmp_path, **given)
    ended = subprocess.run(["bash", str(SBATCH)], env=values, check=False)
    assert ended.returncode == status
    queued = tmp_path / "scontrol.txt"
    assert queued.exists() == is_requeued
    assert not is_requeued or queued.read_text() == "requeue 7\n"


def test_slurm_tasks_have_their_cores_and_no_more_workers(tmp_path):
    """Since Slurm 22.05, srun does not take the number of cores from sbatch."""
    (asked,) = re.findall(r"#SBATCH --cpus-per-task=(\d+)", SBATCH.read_text())
    stub(tmp_path, "srun", "echo $@ > $WORKDIR/srun.txt; touch $WORKDIR/results.json")
    given = {"WORKDIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": asked}
    subprocess.run(["bash", str(SBATCH)], env=environment(tmp_path, **given), check=True)
    words = (tmp_path / "srun.txt").read_text().split()
    assert f"--cpus-per-task={asked}" in words[: words.index("python")]
    assert f"--config.input.num_workers={int(asked) - 1}" in words


def start_pod(tmp_path: Path, python: str, index: int) -> subprocess.Popen:
    stub(tmp_path, "python", python)
    _, container = job_and_container(manifest())
    values = {one["name"]: one["value"] for one in container["env"]}
    values |= {"WORKDIR": str(tmp_path), "JOB_COMPLETION_INDEX": str(index)}
    return subprocess.Popen(container["command"], env=environment(tmp_path, **values))


@pytest.mark.parametrize(
    ("python", "index", "status"),
    [
        ("touch $WORKDIR/results.json", 0, 0),
        ("true", 0, 1),  # no results: not finished
        ("true", 1, 0),  # pod 0 decides for all
        ("exit 3", 1, 3),
    ],
)
def test_pod_fails_unless_the_run_is_finished(tmp_path, python, index, status):
    assert start_pod(tmp_path, python, index).wait(timeout=30) == status


def test_pod_passes_sigterm_on_and_waits_for_the_save(tmp_path):
    python = (
        "trap 'sleep 0.5; touch $WORKDIR/saved; exit 0' TERM\n"
        "touch $WORKDIR/started\nfor _ in {1..600}; do sleep 0.05; done"
    )
    pod = start_pod(tmp_path, python, 0)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    pod.send_signal(signal.SIGTERM)
    assert pod.wait(timeout=30) == 1  # stopped, not finished: the JobSet starts again
    assert (tmp_path / "saved").exists()
