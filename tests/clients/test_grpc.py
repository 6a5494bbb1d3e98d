"""A Python gRPC client generated from proto/ against `moesaic up`."""
import pathlib
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    out = tmp_path_factory.mktemp("stubs")
    assert protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}", "moesaic/inference/v1/inference.proto"]) == 0
    sys.path.insert(0, str(out))
    from moesaic.inference.v1 import inference_pb2, inference_pb2_grpc
    return inference_pb2, inference_pb2_grpc


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc) as c:
        yield c


def test_health_and_reflection(channel):
    # the status follows readiness: the watch tells when
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=10)
    assert any(update.status == health_pb2.HealthCheckResponse.SERVING for update in watch)
    services = set(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert {"moesaic.inference.v1.InferenceService", "grpc.health.v1.Health"} <= services
    assert not any(name.startswith("moesaic.") and "inference" not in name for name in services), "only what is served here"


def test_generate_streams(channel, stubs):
    pb, rpc = stubs
    stub = rpc.InferenceServiceStub(channel)
    model = stub.ListModels(pb.ListModelsRequest(), timeout=10).models[0].id
    tokens = stub.Tokenize(pb.TokenizeRequest(model=model, text="The currency of"), timeout=10).tokens
    assert stub.Detokenize(pb.DetokenizeRequest(model=model, tokens=tokens), timeout=10).text == "The currency of"
    request = pb.GenerateRequest(model=model, text="The currency of")
    request.sampling.temperature = 0
    request.sampling.max_tokens = 8
    pieces = list(stub.Generate(request, timeout=60))
    again = list(stub.Generate(request, timeout=60))
    assert len(pieces) > 1, "the answer is streamed"
    assert "".join(p.text for p in pieces) == "".join(p.text for p in again) != ""


def test_bad_input_has_details(channel, stubs):
    pb, rpc = stubs
    request = pb.GenerateRequest(model="no-such-model", text="x")
    with pytest.raises(grpc.RpcError) as e:
        list(rpc.InferenceServiceStub(channel).Generate(request, timeout=10))
    assert e.value.code() == grpc.StatusCode.NOT_FOUND and "no-such-model" in e.value.details()
