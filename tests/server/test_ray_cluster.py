"""`server.ray_app` on a cluster of two nodes on this machine, a replica on each."""

import asyncio
import json
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import yaml
from live_server import DEADLINE_S, ENDLESS, poll
from prometheus_client.parser import text_string_to_metric_families
from ray_nodes import processes, two_nodes

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments:DeprecationWarning"),  # Ray's own
]
STREAMS = 20


def replicas():
    """Processes of the replicas."""
    return processes("ray::ServeReplica:lowkey:Lowkey")


class Service:
    """The application, as a client sees it."""

    def __init__(self, url):
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=DEADLINE_S)

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=DEADLINE_S, **options)

    def by_replica(self, name, **labels):
        """One metric's samples of each replica, added up."""
        found = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    replica = sample.labels["replica"]
                    found[replica] = found.get(replica, 0) + sample.value
        return found

    def wait_replicas(self, *without):
        """Until two replicas answer for both variants, none of them in `without`."""

        def there():
            up = self.by_replica("lowkey_engine_up")
            return list(up.values()) == [2, 2] and not up.keys() & set(without)

        poll(there, "two replicas are up")

    def wait_idle(self):
        poll(lambda: self.used_slots() == 0, "no slot is used")

    def used_slots(self):
        return sum(self.by_replica("lowkey_state_slots", state="used").values())


def deployed(config, port):
    """deploy/ray/serve.yaml, made to fit this cluster."""
    document = yaml.safe_load((ROOT / "deploy/ray/serve.yaml").read_text())
    document["proxy_location"] = "HeadOnly"  # the nodes share this machine's ports
    document["http_options"] |= {"host": "127.0.0.1", "port": port}
    (application,) = document["applications"]
    application["args"]["config"] = str(config)
    front, lowkey = application["deployments"]
    front |= {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
    del lowkey["autoscaling_config"]
    lowkey |= {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}, "max_ongoing_requests": STREAMS - 4}
    lowkey["graceful_shutdown_timeout_s"] = 300
    return document


@pytest.fixture(scope="module")
def service(checkpoints, tmp_path_factory):
    pytest.importorskip("ray", reason="needs the extra `ray`, which `make test-all` installs")
    config = tmp_path_factory.mktemp("ray") / "lowkey.toml"
    sources = "".join(f'{name} = "{path}"\n' for name, path in checkpoints.items())
    config.write_text(f"max_requests = {STREAMS}\n[variants]\n{sources}")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with two_nodes(1) as cluster:
        import ray
        from ray import serve
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        document = ServeDeploySchema.model_validate(deployed(config, port))
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(document.proxy_location, document.http_options.model_dump())
        _get_global_client().deploy_apps(document)  # what `serve deploy` has the dashboard do
        service = Service(f"http://127.0.0.1:{port}")
        poll(lambda: service.http.get("/ready").status_code == 200, "the application answers", 2 * DEADLINE_S)
        service.wait_replicas()
        yield service
        service.http.close()


def completion(client, **fields):
    body = {"model": "dense", "prompt": "Once upon", "max_tokens": 8, "extra_body": {"ignore_eos": True}}
    return client.completions.create(**(body | fields))


def test_an_answer_is_the_same_streamed_and_whole(service):
    client = service.client()
    for model in ("dense", "reduced"):
        whole = completion(client, model=model, temperature=0, max_tokens=20)
        chunks = list(completion(client, model=model, temperature=0, max_tokens=20, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
        # Tokens that waited for each other share a chunk; the reason has one of its own.
        reasons = [c.choices[0].finish_reason for c in chunks]
        assert len(chunks) > 1 and reasons == [None] * (len(chunks) - 1) + ["length"]
    assert {m.id for m in client.models.list()} == {"dense", "reduced"}
    refused = service.http.post("/v1/completions", json={"model": "nobody's", "prompt": "x"})
    assert refused.status_code == 404
    assert len(refused.headers.get_list("x-request-id")) == 1


def test_prompts_that_begin_alike_go_to_one_replica_and_others_to_all(service):
    client = service.client()

    def tokens():
        return service.by_replica("lowkey_prompt_tokens_total", variant="dense")

    before, cached = tokens(), 0
    for number in range(6):
        answer = completion(client, prompt="the same beginning " * 60 + str(number), max_tokens=1)
        cached += answer.usage.prompt_tokens_details.cached_tokens
    after = tokens()
    assert len([replica for replica in after if after[replica] > before[replica]]) == 1
    assert cached > 3 * 1000
    for number in range(32):
        completion(client, prompt=f"{number} is another beginning", max_tokens=1)
    assert all(value > after[replica] for replica, value in tokens().items())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(service, stream):
    def aborted():
        return sum(service.by_replica("lowkey_requests_total", finish_reason="abort").values())

    before = aborted()
    body = {"model": "dense", "prompt": "x", "max_tokens": ENDLESS, "ignore_eos": True, "stream": stream}

    async def ask_and_leave():
        async with httpx.AsyncClient(base_url=service.url, timeout=DEADLINE_S) as client:
            asked = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.to_thread(poll, lambda: service.used_slots() == 1, "it runs")
            asked.cancel()
            await asyncio.wait([asked])

    asyncio.run(ask_and_leave())
    poll(lambda: aborted() == before + 1, "the request was aborted")
    service.wait_idle()


async def read_stream(service, prompt, begun, *, max_tokens, leave=None):
    """The events of a stream until its end, or `leave` is set."""
    body = {"model": "dense", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    events = []
    async with httpx.AsyncClient(base_url=service.url, timeout=DEADLINE_S) as http:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if line:
                    events.append(line.removeprefix("data: "))
                    begun.set()
                if leave is not None and leave.is_set():
                    break
    return events


def test_a_killed_replica_costs_streams_an_error_event_and_retried_requests_nothing(service):
    running, over = threading.Event(), threading.Event()
    client = service.client(max_retries=10)

    def ask_until_over(worker):
        answers = 0
        while not over.is_set():
            answer = completion(client, prompt=f"{worker} asks {answers}", max_tokens=16)
            assert answer.usage.completion_tokens == 16
            answers += 1
            if answers == 3:
                running.set()
        return answers

    async def streams():
        # More than one replica is sent: both have some. They would go on for long.
        begun = [asyncio.Event() for _ in range(STREAMS)]
        leave = asyncio.Event()
        reads = [
            asyncio.create_task(read_stream(service, f"{n} is", begun[n], max_tokens=ENDLESS, leave=leave))
            for n in range(STREAMS)
        ]
        await asyncio.gather(*(b.wait() for b in begun))
        replicas()[0].kill()
        await asyncio.wait(reads, return_when=asyncio.FIRST_COMPLETED, timeout=DEADLINE_S)
        await asyncio.to_thread(
            poll,
            lambda: service.by_replica("lowkey_engine_up").keys() - before,
            "a new replica",
            2 * DEADLINE_S,
        )
        leave.set()
        return await asyncio.gather(*reads)

    before = service.by_replica("lowkey_engine_up").keys()
    assert len(before) == len(replicas()) == 2
    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(ask_until_over, n) for n in range(4)]
        try:
            assert running.wait(DEADLINE_S)
            streamed = asyncio.run(streams())
        finally:
            over.set()
        assert all(worker.result() for worker in workers)
    cut = [events for events in streamed if "error" in json.loads(events[-2])]
    for events in cut:
        assert json.loads(events[-2])["error"]["code"] == 503
        assert events[-1] == "[DONE]"
    assert 0 < len(cut) < STREAMS
    service.wait_replicas(*before - service.by_replica("lowkey_engine_up").keys())
    service.wait_idle()


def test_requests_end_before_a_replica_does(service):
    from ray import serve

    def engines():
        found = processes("server.engine.process")  # those of other tests' servers, too
        return [p for p in found if p.environ().get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]]

    async def live():
        begun = asyncio.Event()
        read = asyncio.create_task(read_stream(service, "0 is", begun, max_tokens=1000))
        await begun.wait()
        assert len(engines()) == 4
        await asyncio.to_thread(serve.delete, "lowkey")
        return await read

    events = asyncio.run(live())
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    poll(lambda: not engines(), "the engines are gone")
