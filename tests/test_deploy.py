"""The files of a real cluster: Ray's launcher takes ray_cluster.yaml, our parser the RayJob's entrypoint, versions agree."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from packaging.requirements import Requirement

from jobs import caption
from pipeline.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = (ROOT / "ray_cluster.yaml").read_text()
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

FILLED = {
    "FILL-IN-REGION": "eu-west-1",
    "FILL-IN-IMAGE": "trimmed-mllama:0.1.0",
    "FILL-IN-INSTANCE-PROFILE": "arn:aws:iam::123456789012:instance-profile/nodes",
}


def filled() -> dict[str, Any]:
    """The cluster file as a user hands it to ``ray up``: its text with the three fields filled in."""
    text = CLUSTER
    for field, value in FILLED.items():
        text = text.replace(field, value)
    return yaml.safe_load(text)


def prepared() -> dict[str, Any]:
    """What ``ray up`` makes of it, and has validated by its schema, before it asks AWS for anything."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(filled())
    validate_config(config)
    return config


def leaves(value: Any) -> Iterator[Any]:
    """All scalars in a YAML document."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from leaves(part)
    else:
        yield value


def commands(config: dict[str, Any]) -> list[str]:
    return [command for key, value in config.items() if key.endswith("_commands") for command in value]


def rayjob() -> tuple[dict[str, Any], dict[str, Any]]:
    account, job = yaml.safe_load_all((ROOT / "deploy" / "rayjob.yaml").read_text())
    return account, job


def test_three_fields_are_to_be_filled_in() -> None:
    config = yaml.safe_load(CLUSTER)
    head, gpu = (config["available_node_types"][kind]["node_config"] for kind in ("head", "gpu"))
    assert config["provider"]["region"] == "FILL-IN-REGION"
    assert config["docker"]["image"] == "FILL-IN-IMAGE"
    assert head["IamInstanceProfile"]["Arn"] == gpu["IamInstanceProfile"]["Arn"] == "FILL-IN-INSTANCE-PROFILE"
    # Each is typed once, and each has its comment.
    assert sorted(re.findall(r"FILL-IN-[A-Z-]+", CLUSTER)) == sorted(FILLED)
    assert re.findall(r"FILL-IN (\d):", CLUSTER) == ["1", "2", "3"]
    # Nothing else waits for a user, and nothing is anyone's own.
    for leaf in leaves(filled()):
        assert not re.search(r"FILL|TODO|CHANGE|<[^&]|\.\.\.|s3://|\bhf_|AKIA|\bami-[0-9a-f]{8}", str(leaf)), leaf


def test_rays_schema_takes_the_cluster() -> None:
    config = prepared()
    # Ray's defaults would install another Ray, and boto3, over the image's.
    assert config["head_setup_commands"] == config["worker_setup_commands"] == []
    assert not any("pip install" in command for command in commands(config))
    assert any("ray start --head" in command and "--autoscaling-config" in command for command in commands(config))
    assert any("ray start --address=$RAY_HEAD_IP:6379" in command for command in commands(config))
    # Jobs are taken from the head itself alone.
    assert all("--dashboard-host=127.0.0.1" in command for command in commands(config) if "--head" in command)


@pytest.mark.parametrize(
    ("where", "key", "value"), [("", "spot", True), ("docker", "images", "x"), ("gpu", "min_workers", "none")]
)
def test_rays_schema_refuses_what_is_mistyped(where: str, key: str, value: Any) -> None:
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    config = prepared()
    part = config["available_node_types"]["gpu"] if where == "gpu" else config[where] if where else config
    part[key] = value
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config)


def test_commands_are_shell() -> None:
    for command in commands(filled()):
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_the_launcher_starts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own launcher against an EC2 server: the head on demand, workers on spot with a GPU, both with the role."""
    import boto3
    from moto.server import ThreadedMotoServer
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import validate_config

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    # The launcher writes its key pair into ~/.ssh.
    for name, value in {**keys, "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    try:
        region = FILLED["FILL-IN-REGION"]
        # What the file asks its user for.
        boto3.client("iam", region_name=region).create_instance_profile(InstanceProfileName="nodes")
        config = AWSNodeProvider.fillout_available_node_types_resources(prepared())
        validate_config(config)
        config = AWSNodeProvider.bootstrap_config(config)
        kinds = config["available_node_types"]
        assert kinds["head"]["resources"]["CPU"] == 0
        assert (kinds["gpu"]["resources"]["GPU"], kinds["gpu"]["resources"]["CPU"]) == (1, 8)
        assert (kinds["gpu"]["min_workers"], kinds["gpu"]["max_workers"]) == (0, config["max_workers"])

        # The server takes any market for spot.
        assert kinds["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"

        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind in ("head", "gpu"):
            provider.create_node(dict(kinds[kind]["node_config"]), {"ray-node-type": kind}, 1)
        ec2 = boto3.client("ec2", region_name=region)
        found = [i for r in ec2.describe_instances()["Reservations"] for i in r["Instances"]]
        head, worker = sorted(found, key=lambda instance: "InstanceLifecycle" in instance)
        assert "InstanceLifecycle" not in head
        assert worker["InstanceLifecycle"] == "spot"
        for instance in (head, worker):
            assert instance["IamInstanceProfile"]["Arn"] == FILLED["FILL-IN-INSTANCE-PROFILE"]
        types = ec2.describe_instance_types(InstanceTypes=[head["InstanceType"], worker["InstanceType"]])["InstanceTypes"]
        assert {kind["InstanceType"] for kind in types if "GpuInfo" in kind} == {worker["InstanceType"]}
        # From outside there is SSH alone.
        groups = ec2.describe_security_groups(GroupIds=kinds["gpu"]["node_config"]["SecurityGroupIds"])["SecurityGroups"]
        open_to_all = [rule["FromPort"] for group in groups for rule in group["IpPermissions"] if rule["IpRanges"]]
        assert open_to_all == [22]
    finally:
        server.stop()


def test_the_rayjobs_entrypoint_is_one_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    spec = rayjob()[1]["spec"]
    # The submitter's shell and the head's both read it.
    assert not re.search(r"[\"'*?$;&|<>\\]", spec["entrypoint"])
    python, m, module, *arguments = shlex.split(spec["entrypoint"])
    assert (python, m, module) == ("python", "-m", "jobs.caption")
    # The job's own parser, which prints what it made of the options and ends.
    with pytest.raises(SystemExit) as ended:
        caption.main([*arguments, "--print-config"])
    assert not ended.value.code
    parsed = yaml.safe_load(capsys.readouterr().out)
    parsed.pop("dry_run")
    config = RunConfig(job="caption", question_column=None, **parsed)
    assert not config.overwrite, "a retry would delete what it is to continue"

    # What pipeline.cluster asks for is what there will be.
    assert config.wait_minutes > 0
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.num_actors * (config.gpus_per_actor or 0) == group["replicas"] * limits["nvidia.com/gpu"]
    assert config.num_actors * config.cpus_per_actor + 1 <= group["replicas"] * int(limits["cpu"])
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_rayjob_continues_and_ends() -> None:
    account, job = rayjob()
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] > 0
    assert spec["activeDeadlineSeconds"] > 24 * 3600
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    # As Ray reads it, which takes nothing but strings in there.
    assert ray.runtime_env.RuntimeEnv(**environment)["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "30"}

    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["authOptions"] == {"mode": "token"}
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    pods = [part["template"]["spec"] for part in (head, group)]
    assert {pod["serviceAccountName"] for pod in pods} == {account["metadata"]["name"]}
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    assert "nvidia.com/gpu" not in pods[0]["containers"][0]["resources"]["limits"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pods[1]["tolerations"]
    # Killed no sooner than the job that it runs.
    assert pods[0]["terminationGracePeriodSeconds"] > int(environment["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    # Secrets are named, never written out.
    for variable in (variable for pod in pods for variable in pod["containers"][0]["env"]):
        assert "value" not in variable
        assert variable["valueFrom"]["secretKeyRef"]["optional"] is True


def test_the_image_runs_the_pinned_ray() -> None:
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE, re.MULTILINE)
    found = re.fullmatch(r"rayproject/ray:(\d+\.\d+\.\d+)-py(\d)(\d+)-(cu\d+|gpu)", base)
    assert found, base
    version, python = found[1], f"{found[2]}.{found[3]}"
    assert f"\nray=={version}\n" in (ROOT / "constraints.txt").read_text()
    (pinned,) = [r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if r.name == "ray"]
    assert pinned.specifier.contains(version)
    # The lowest Python that is supported, which is also the one that constraints.txt was tried on.
    assert PYPROJECT["project"]["requires-python"] == f">={python}"


def test_the_image_holds_what_it_copies_and_nothing_else() -> None:
    copied = [name for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for name in line.split()[1:-1]]
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == set(copied)
    assert all((ROOT / name).exists() for name in copied)
    # All that the distribution is made of.
    packages = {name for name in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"] if "." not in name}
    assert {*packages, PYPROJECT["project"]["readme"], *PYPROJECT["project"]["license-files"]} <= set(copied)

    users = re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)
    assert users
    assert users[-1].isdigit()
    assert users[-1] != "0"
    assert not re.search(r"^(ARG|ENV).*(TOKEN|SECRET|PASSWORD|KEY)", DOCKERFILE, re.MULTILINE)
    installs = re.findall(r"pip install.*", DOCKERFILE)
    assert installs
    assert all("--constraint constraints.txt" in line for line in installs)
