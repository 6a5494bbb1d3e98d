"""The chart as Helm renders it with several values, and the program that knows every setting."""
import os
import pathlib
import subprocess

import helm_python as helm
import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/moesaic"

VARIANTS = {
    "default": {},
    "everything": {
        "image": {"repository": "registry.example.com/moesaic", "tag": "1.2.3", "pullSecrets": [{"name": "registry"}]},
        "model": {"path": "/models/big", "existingClaim": "models"},
        "config": {"scheduler.token_budget": 256, "router.placement.min_gain": 0.1, "gateway.share_prefixes": True},
        "telemetry": {"logFormat": "human", "otlpEndpoint": "http://otel-collector:4317"},
        "gateway": {
            "replicas": 3, "drainSeconds": 600, "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
            "saltSecret": {"existingSecret": "salt"}, "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "certificate", "annotations": {"c": "d"}},
        },
        "scheduler": {"kvMemory": "4GiB", "autoscaling": {"enabled": True}, "nodeSelector": {"disk": "fast"}},
        "expertShard": {"groups": 3, "ranks": 2, "minCopies": 2},
        "kvStore": {"replicas": 3, "replication": 2, "disk": {"storageClass": "fast"}},
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "networkPolicy": {"doorsFrom": [{"podSelector": {"matchLabels": {"app": "client"}}}]},
        "podAnnotations": {"x": "y"},
        "priorityClassName": "high",
        "serviceAccount": {"annotations": {"e": "f"}},
    },
    "little": {
        "fullnameOverride": "m",
        "expertShard": {"groups": 0},
        "kvStore": {"replicas": 0},
        "redis": {"enabled": False, "existingSecret": "redis"},
        "nats": {"enabled": False, "url": "nats://nats.example.com:4222"},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "topologySpread": {"enabled": False},
        "serviceAccount": {"create": False},
    },
    "ipv6 and keda": {
        "ipv6": True,
        "scheduler": {"autoscaling": {"enabled": True, "kind": "keda"}},
        "kvStore": {"disk": {"enabled": False}},
    },
}


def render(values):
    """All objects of a release, as (template, object)."""
    with helm.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name="demo", namespace="prod")
    objects = []
    for name, text in files.items():
        if name.endswith("NOTES.txt"):
            continue
        objects += [(name, found) for found in yaml.safe_load_all(text) if found]
    return objects


@pytest.fixture(params=VARIANTS, scope="session")
def release(request):
    """The objects of one variant."""
    return [found for _, found in render(VARIANTS[request.param])]


PROGRAM = pathlib.Path(os.environ.get("MOESAIC_BINARY", ROOT / "target/debug/moesaic")).resolve()


def run(command, variables):
    """Runs a command with these variables and no others; returns what it prints, or fails with what it says."""
    done = subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command} {variables}: {done.stderr}"
    return done.stdout


def settings(arguments, variables):
    """The same for the program."""
    return run([PROGRAM, *arguments], variables)
