"""Asks a Prometheus that watches a running cluster for each expression of the dashboard, and expects an answer."""
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "deploy/observability/grafana/dashboards/moesaic.json"
DEADLINE = 180
# what a cluster that does well for a minute has none of; their names are checked by tests/tests/observability.rs
MAY_BE_EMPTY = re.compile(
    r"moesaic_(grpc_requests|migrations|router_refusals|router_event_gaps|preemptions|engine_restarts|actor_restarts"
    r"|request_failures|requests_cancelled|expert_retries|expert_failures|step_retries|placement_changes|placement_moves"
    r"|prefix_store_(fetched|skipped|dropped)_blocks|kv_store_(evictions|replicated|replication_dropped|corrupt"
    r"|disk_failures|disk_hits|hits|misses))_total|moesaic_placement_imbalance|moesaic_kv_store_disk_bytes|ALERTS"
)


def until(what, condition):
    end, last = time.monotonic() + DEADLINE, None
    while time.monotonic() < end:
        try:
            found = condition()
            if found:
                return found
        except OSError as error:
            last = error
        time.sleep(0.2)  # between two looks at the condition
    sys.exit(f"observability: failed: {what}: not within {DEADLINE} s: {last}")


def fetch(url, body=None):
    request = urllib.request.Request(url, body and json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def watch(folder, log):
    """Prometheus' own settings, with the addresses of this cluster in place of the compose file's."""
    jobs = {}
    for name, address in re.findall(r'started process="([^"]+)" pid=\d+ address=(\S+)', log):
        job = re.match(r"gateway|router|scheduler|expert-shard|kv-store|redis|nats", name)[0]
        host, port = address.rsplit(":", 1)
        jobs.setdefault(job, []).append((name, f"{host}:{int(port) + 1000}"))
    lines = ["global: {scrape_interval: 1s, evaluation_interval: 1s}", "rule_files: [alerts.yml]", "scrape_configs:"]
    for job, members in jobs.items():
        if job in ("redis", "nats"):
            continue
        lines.append(f"  - job_name: {job}\n    static_configs:")
        lines += [f'      - {{targets: ["{at}"], labels: {{instance: {name}}}}}' for name, at in members]
    (folder / "prometheus.yml").write_text("\n".join(lines) + "\n")
    (folder / "alerts.yml").write_text((ROOT / "deploy/observability/alerts.yml").read_text())
    return sum(len(members) for job, members in jobs.items() if job not in ("redis", "nats"))


def main(program):
    dashboard = json.loads(DASHBOARD.read_text())
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        with open(folder / "log", "w") as log:
            cluster = subprocess.Popen(
                [program, "up", "--cluster", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
            )
        prometheus = None
        try:
            log = lambda: (folder / "log").read_text()
            ready = until("the cluster is ready", lambda: cluster.poll() is not None or re.search(r"ready: (http\S+)/v1", log()))
            if ready is True:
                sys.exit(f"observability: failed: the cluster ended:\n{log()}")
            members, door = watch(folder, log()), ready[1]
            own = f"127.0.0.1:{free_port()}"
            with open(folder / "prometheus.log", "w") as output:
                prometheus = subprocess.Popen(
                    ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                     f"--web.listen-address={own}", "--log.level=warn"],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                )

            def ask(expression):
                query = urllib.parse.urlencode({"query": expression.replace("$__rate_interval", "30s")})
                return fetch(f"http://{own}/api/v1/query?{query}")["data"]["result"]

            until(f"prometheus reaches all {members} services", lambda: len(ask("up == 1")) == members)
            prompt = "A merchant from the north sold lamps. " * 40
            for number in range(6):
                body = {"model": "demo-moe", "temperature": 0, "max_tokens": 24, "ignore_eos": True, "prompt": prompt + str(number // 2)}
                fetch(f"{door}/v1/completions", body)

            # a rate wants two samples after the requests
            until("tokens are seen", lambda: any(float(s["value"][1]) > 0 for s in ask("sum(increase(vllm:generation_tokens_total[30s]))")))
            asked, empty = 0, []
            for panel in dashboard["panels"]:
                for target in panel.get("targets", []):
                    expression = target["expr"]
                    asked += 1
                    if not until_has(lambda: ask(expression), bool(MAY_BE_EMPTY.search(expression))):
                        empty.append(f'{panel["title"]}: {expression}')
            if empty:
                sys.exit("observability: failed: nothing to show for\n" + "\n".join(empty))
            firing = [alert["metric"]["alertname"] for alert in ask('ALERTS{alertstate="firing"}')]
            if firing:
                sys.exit(f"observability: failed: a cluster that does well fires {firing}")
            print(f"observability: {asked} expressions of the dashboard answered by a running cluster of {members} services")
        finally:
            for process in filter(None, (prometheus, cluster)):
                process.send_signal(signal.SIGTERM)
            for process in filter(None, (prometheus, cluster)):
                process.wait(timeout=60)


def until_has(ask, may_be_empty):
    """Whether there is an answer, which may come with the next scrapes."""
    end = time.monotonic() + (0 if may_be_empty else 10)
    while True:
        if ask() or may_be_empty:
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)  # between two looks at the condition


if __name__ == "__main__":
    main(sys.argv[1])
