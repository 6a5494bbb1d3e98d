"""deploy/helm/moesaic: Helm accepts it, Kubernetes accepts what it renders, and what it says holds together."""
import json
import pathlib
import re
import tempfile

import helm_python as helm
import kubernetes_validate
import pytest
import yaml
from conftest import CHART, PROGRAM, ROOT, VARIANTS, render, run, settings

try:
    import tomllib
except ImportError:  # before Python 3.11
    import tomli as tomllib

SERVICES = ["gateway", "router", "scheduler", "expert-shard", "kv-store"]
# kinds that are not Kubernetes' own
CUSTOM = {"PodMonitor": "monitoring.coreos.com/v1", "ScaledObject": "keda.sh/v1alpha1"}


def workloads(release):
    return [found for found in release if found["kind"] in ("Deployment", "StatefulSet")]


def component(found):
    return found["metadata"]["labels"]["app.kubernetes.io/component"]


def services(release):
    return [found for found in workloads(release) if component(found) in SERVICES]


def container(workload):
    [only] = workload["spec"]["template"]["spec"]["containers"]
    return only


def variables(workload, pod_ip="10.1.2.3", number=1):
    """A container's variables, as Kubernetes would set them in the pod of a number."""
    known = {
        "status.podIP": pod_ip,
        "metadata.name": workload["metadata"]["name"] + f"-{number}",
        "metadata.labels['apps.kubernetes.io/pod-index']": str(number),
        "requests.cpu": "1",
    }
    found = {}
    for variable in container(workload)["env"]:
        name, value = variable["name"], variable.get("value")
        assert name not in found, f"{name} is set twice"
        if value is None:
            [(kind, source)] = variable["valueFrom"].items()
            if kind == "secretKeyRef":
                value = {"REDIS_URL": "redis://secret", "NATS_URL": "nats://secret"}.get(name, "secret")
            else:
                value = known[source.get("fieldPath") or source["resource"]]
        found[name] = re.sub(r"\$\(([A-Z_]+)\)", lambda match: found[match[1]], value)
    return found


def effective(workload, **more):
    """The settings that the service would have, as it prints them itself when the container's command starts it."""
    with tempfile.TemporaryDirectory() as folder:
        program = pathlib.Path(folder) / f"moesaic-{component(workload)}"
        program.write_text(f'#!/bin/sh\nexec "{PROGRAM}" service {component(workload)} --dump-config\n')
        program.chmod(0o755)
        path = {"PATH": f"{folder}:/usr/bin:/bin"}
        return tomllib.loads(run(container(workload)["command"], {**variables(workload, **more), **path}))


def selects(selector, labels):
    return all(labels.get(key) == value for key, value in selector.items())


def test_helm_finds_nothing_wrong():
    for values in VARIANTS.values():
        report = helm.lint(str(CHART), values, strict=True)
        wrong = [message for message in report["messages"] if message["severity"] > 1]
        assert not wrong and not report["errors"], report


@pytest.mark.parametrize("version", ["1.28.0", "1.34.0"])
def test_kubernetes_accepts_every_object(release, version):
    for found in release:
        if found["kind"] in CUSTOM:
            assert found["apiVersion"] == CUSTOM[found["kind"]]
        else:
            kubernetes_validate.validate(found, version, strict=True)
        assert len(found["metadata"]["name"]) <= 52  # a pod's number and hash come after it


@pytest.mark.parametrize(
    "values",
    [
        {"replicas": 3},
        {"scheduler": {"replica": 3}},
        {"scheduler": {"replicas": 0}},
        {"scheduler": {"autoscaling": {"kind": "vpa"}}},
        {"expertShard": {"ranks": 65}},
        {"config": {"schedular.token_budget": 1}},
        {"config": {"scheduler": {"token_budget": 1}}},
        {"redis": {"url": "http://x"}},
        {"kvStore": {"disk": {"size": "20GiB"}}},
        {"telemetry": {"logFormat": "text"}},
    ],
)
def test_wrong_values_are_refused(values):
    with pytest.raises(helm.HelmError):
        render(values)


def test_every_value_is_documented_and_has_a_schema():
    """Each key of values.yaml is in the schema and the other way round."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    with helm.Chart.load(str(CHART)) as chart:
        values = chart.values

    def same(values, schema, at):
        if schema.get("additionalProperties", True) is not False:
            return
        keys = set(schema["properties"]) - {"global", "claims"}
        optional = {"limits"} if at.endswith("resources") else set()
        assert keys - optional == set(values) - optional, at
        for key in values:
            if isinstance(values[key], dict):
                same(values[key], schema["properties"][key], f"{at}.{key}")

    same(values, schema, "")


def test_without_redis_it_says_what_to_set():
    with pytest.raises(helm.HelmError, match="redis.url"):
        render({"redis": {"enabled": False}})


def test_variables_are_settings_and_mean_what_they_say(release):
    for workload in services(release):
        own = effective(workload)
        # unknown keys in others' sections are found by the whole configuration
        settings(["config"], variables(workload))
        name = workload["metadata"]["name"] + "-1"
        assert own["cluster"]["id"] == name
        section = component(workload).replace("-", "_")
        port = own[section]["grpc"].rsplit(":", 1)[1]
        ports = {port["name"]: port["containerPort"] for port in container(workload)["ports"]}
        assert ports["grpc"] == int(port) and ports["admin"] == int(port) + 1000
        ip = "fd00::1" if own[section]["grpc"].startswith("[") else "10.1.2.3"
        advertised = effective(workload, pod_ip=ip)["cluster"]["advertise"]
        assert advertised == f"http://{f'[{ip}]' if ':' in ip else ip}:{port}"
        if component(workload) == "gateway":
            assert own["gateway"]["http"].rsplit(":", 1)[1] == str(ports["http"])


def test_a_misspelt_setting_is_found():
    for wrong in ["MOESAIC__CLUSTER__IDD", "MOESAIC__SCHEDULAR__GRPC", "MOESAIC__MODEL__THREAD"]:
        with pytest.raises(AssertionError, match=wrong):
            settings(["service", "scheduler", "--dump-config"], {wrong: "1"})


def test_free_settings_reach_the_services():
    release = [found for _, found in render(VARIANTS["everything"])]
    own = {component(workload): effective(workload) for workload in services(release)}
    assert own["scheduler"]["scheduler"]["token_budget"] == 256
    assert own["scheduler"]["scheduler"]["kv_memory_bytes"] == "4GiB"
    assert own["router"]["router"]["placement"]["min_gain"] == 0.1
    assert own["router"]["router"]["placement"]["min_copies"] == 2
    assert own["gateway"]["gateway"]["share_prefixes"] is True
    assert own["gateway"]["gateway"]["salt_secret"] == "***"
    assert own["expert-shard"]["model"]["path"] == "/models/big"
    assert own["kv-store"]["kv_store"]["replication"] == 2
    assert all(settings["telemetry"]["otlp_endpoint"] == "http://otel-collector:4317" for settings in own.values())
    for workload in services(release):
        mounts = {mount["mountPath"] for mount in container(workload)["volumeMounts"]}
        assert ("/models" in mounts) == (component(workload) in ("gateway", "scheduler", "expert-shard"))


def test_shards_cover_each_group_and_rank_once(release):
    shards = [workload for workload in services(release) if component(workload) == "expert-shard"]
    places = []
    for workload in shards:
        for number in range(workload["spec"]["replicas"]):
            own = effective(workload, number=number)["expert_shard"]
            places.append((own["group"], own["rank"], own["ranks"]))
    groups = {group for group, _, _ in places}
    ranks = places[0][2] if places else 0
    assert places == [(group, rank, ranks) for group in range(len(groups)) for rank in range(ranks)]
    [router] = [workload for workload in services(release) if component(workload) == "router"]
    assert effective(router)["router"]["placement"]["min_groups"] == max(1, len(groups))
    [scheduler] = [workload for workload in services(release) if component(workload) == "scheduler"]
    assert effective(scheduler)["scheduler"]["experts"] == ("shards" if groups else "own")


def test_shards_of_another_model_or_of_other_slices_are_another_set():
    def name(values):
        return next(w["metadata"]["name"] for w in services([f for _, f in render(values)]) if component(w) == "expert-shard")

    first = name({})
    assert name({"expertShard": {"groups": 3}}) == name({"gateway": {"replicas": 3}}) == first
    others = [{"expertShard": {"ranks": 1}}, {"model": {"path": "/x"}}, {"config": {"model.weights": "q8"}}]
    assert len({first, *map(name, others)}) == 4


def test_numbers_are_written_out():
    release = [found for _, found in render({"config": {"scheduler.token_budget": 1000000, "router.queue_weight": 2.5}})]
    own = {component(workload): effective(workload) for workload in services(release)}
    assert own["scheduler"]["scheduler"]["token_budget"] == 1000000
    assert own["router"]["router"]["queue_weight"] == 2.5


def test_what_the_chart_sets_is_refused_elsewhere():
    taken = set()
    for values in VARIANTS.values():
        for workload in services([found for _, found in render({**values, "config": {}})]):
            names = {variable["name"] for variable in container(workload)["env"]}
            taken |= {name[9:].replace("__", ".").lower() for name in names if name.startswith("MOESAIC__")}
    for key in taken | {"cluster.redis_url", "expert_shard.group"}:
        with pytest.raises(helm.HelmError, match=re.escape(key)):
            render({"config": {key: "1"}})


def test_nobody_else_reaches_the_admin_ports_where_none_is_named():
    release = [found for _, found in render({"networkPolicy": {"adminFrom": []}})]
    own = next(found for found in release if found["kind"] == "NetworkPolicy")
    assert [list(rule) for rule in own["spec"]["ingress"]] == [["from"]] and own["spec"]["ingress"][0]["from"]


def test_a_long_name_is_cut():
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render({}, name="a" * 53, namespace="prod")
    for text in files.values():
        for found in yaml.safe_load_all(text) if "kind:" in text else []:
            assert not found or len(found["metadata"]["name"]) <= 52


def test_a_pod_may_take_longer_to_end_than_its_drain(release):
    for workload in services(release):
        drain = effective(workload)[component(workload).replace("-", "_")]["drain_timeout"]
        seconds = sum(int(n) * {"s": 1, "m": 60, "h": 3600}[unit] for n, unit in re.findall(r"(\d+)([smh])", drain))
        linger = container(workload).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [0, 0])[1]
        assert workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > seconds + int(linger) + 5


def test_probes_ask_the_admin_port(release):
    for workload in services(release):
        probes = {name: container(workload)[f"{name}Probe"]["httpGet"] for name in ("readiness", "liveness")}
        assert probes == {
            "readiness": {"path": "/ready", "port": "admin"},
            "liveness": {"path": "/live", "port": "admin"},
        }


def test_pods_are_locked_down(release):
    for workload in workloads(release):
        pod, only = workload["spec"]["template"]["spec"], container(workload)
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
        }
        assert only["resources"]["requests"] and only["resources"]["limits"]["memory"]
        assert ":" in only["image"] and not only["image"].endswith(":latest")


def test_selectors_find_their_pods_and_no_others(release):
    pods = {workload["metadata"]["name"]: workload["spec"]["template"] for workload in workloads(release)}
    for workload in workloads(release):
        selector = workload["spec"]["selector"]["matchLabels"]
        found = [name for name, pod in pods.items() if selects(selector, pod["metadata"]["labels"])]
        assert found == [workload["metadata"]["name"]]
    for kind in ("Service", "PodDisruptionBudget"):
        for found in (found for found in release if found["kind"] == kind):
            selector = found["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            selected = [pod for pod in pods.values() if selects(selector, pod["metadata"]["labels"])]
            assert {component(pod) for pod in selected} == {component(found)}, found["metadata"]["name"]
            for port in found["spec"].get("ports", []):
                for pod in selected:
                    names = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
                    assert port["targetPort"] in names
    sets = {workload["spec"]["serviceName"] for workload in workloads(release) if workload["kind"] == "StatefulSet"}
    all_services = [found for found in release if found["kind"] == "Service"]
    headless = {found["metadata"]["name"] for found in all_services if found["spec"].get("clusterIP") == "None"}
    assert sets == headless


def test_redis_and_nats_are_where_services_look(release):
    names = {found["metadata"]["name"] for found in release if found["kind"] == "Service"}
    for workload in services(release):
        for name, server in (("REDIS_URL", "redis"), ("NATS_URL", "nats")):
            [variable] = [variable for variable in container(workload)["env"] if variable["name"] == name]
            own = f"demo-moesaic-{server}"
            if own in names:
                port = {"redis": 6379, "nats": 4222}[server]
                assert variable["value"] == f"{server}://{own}:{port}"
            else:
                assert variable.get("value") == "nats://nats.example.com:4222" or "secretKeyRef" in variable["valueFrom"]
                assert not any(component(found) == server for found in workloads(release))


def test_replicas_are_the_autoscalers_where_there_is_one(release):
    [scheduler] = [workload for workload in services(release) if component(workload) == "scheduler"]
    scalers = [found for found in release if found["kind"] in ("HorizontalPodAutoscaler", "ScaledObject")]
    assert ("replicas" in scheduler["spec"]) == (not scalers)
    for scaler in scalers:
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == (scheduler["kind"], scheduler["metadata"]["name"])
        values = (CHART / "values.yaml").read_text()
        known = (ROOT / "services/lib/telemetry/src/metrics.rs").read_text()
        waiting = ["vllm:num_requests_waiting", "moesaic_router_queue_waiting"]
        assert all(f'"{name}"' in known and name in values for name in waiting)
        if scaler["kind"] == "ScaledObject":
            assert all(name in json.dumps(scaler) for name in waiting)
            pod = re.search(r'pod=~\\"([^"]+)\\"', json.dumps(scaler["spec"]["triggers"]).replace('\\\\\\"', '\\"'))[1]
            assert re.fullmatch(pod, scheduler["metadata"]["name"] + "-12")


def test_the_network_lets_through_what_is_needed_and_no_more(release):
    policies = [found["spec"] for found in release if found["kind"] == "NetworkPolicy"]
    if not policies:
        return
    own, doors = policies
    pods = [workload["spec"]["template"]["metadata"]["labels"] for workload in workloads(release)]
    among, admin = own["ingress"]
    assert all(selects(own["podSelector"]["matchLabels"], labels) for labels in pods)
    assert all(selects(among["from"][0]["podSelector"]["matchLabels"], labels) for labels in pods) and "ports" not in among
    assert admin["ports"] == [{"port": "admin"}]
    assert {component({"metadata": {"labels": labels}}) for labels in pods if selects(doors["podSelector"]["matchLabels"], labels)} == {"gateway"}
    assert doors["ingress"][0]["ports"] == [{"port": "http"}, {"port": "grpc"}]


def test_the_compose_file_sets_only_settings():
    """docker-compose.yml sets variables of the same kind; its services know them all."""
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    seen = set()
    for name, service in compose["services"].items():
        command = service.get("command", [""])[0]
        if not command.startswith("moesaic-"):
            continue
        environment = {key: re.sub(r"\$\{[^:}]+:-([^}]*)\}", r"\1", str(value)) for key, value in service["environment"].items()}
        own = tomllib.loads(settings(["service", command.removeprefix("moesaic-"), "--dump-config"], environment))
        settings(["config"], environment)
        assert own["cluster"]["id"] == name and own["cluster"]["advertise"].startswith(f"http://{name}:")
        assert "otlp_endpoint" not in own["telemetry"] or own["telemetry"]["otlp_endpoint"] == "", "no traces are tried"
        seen.add(command.removeprefix("moesaic-"))
    assert seen == set(SERVICES)


def test_the_chart_has_the_version_of_the_workspace():
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    chart = pathlib.Path(CHART / "Chart.yaml").read_text()
    assert f"\nappVersion: {version}\n" in chart and f"\nversion: {version}\n" in chart
