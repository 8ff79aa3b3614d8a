"""A client that knows nothing of SOE but its socket: it finds the service by reflection and calls it.

usage: grpc_client.py SOCKET GROUP VOLUME

Creates GROUP with VOLUME, captures it twice, reads its status, verifies it, asks for what does not
exist, and prints what it saw as one JSON document. Messages are built from the descriptors that the
server itself hands out; there are no generated stubs.
"""

import json
import sys

import grpc
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

SERVICE = "soe.v1.SnapshotOrchestration"
LIMIT_S = 60


class Caller:
    """Calls the methods of a service by name, with requests as dictionaries."""

    def __init__(self, channel, pool, service):
        self.channel = channel
        self.service = pool.FindServiceByName(service)

    def _prepare(self, method, request):
        found = self.service.FindMethodByName(method)
        if found is None:
            raise SystemExit(f"{self.service.full_name} has no method {method}")
        message = json_format.ParseDict(request, GetMessageClass(found.input_type)())
        answer = GetMessageClass(found.output_type)
        kind = self.channel.unary_stream if found.server_streaming else self.channel.unary_unary
        call = kind(
            f"/{self.service.full_name}/{method}",
            request_serializer=type(message).SerializeToString,
            response_deserializer=answer.FromString,
        )
        return call, message

    def one(self, method, **request):
        call, message = self._prepare(method, request)
        return as_dict(call(message, timeout=LIMIT_S))

    def stream(self, method, **request):
        call, message = self._prepare(method, request)
        return [as_dict(item) for item in call(message, timeout=LIMIT_S)]


def as_dict(message):
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def main(socket, group, volume):
    # The default authority of a unix socket is its escaped path, which strict servers refuse.
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{socket}", options=options) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = DescriptorPool(database)
        soe = Caller(channel, pool, SERVICE)
        health = Caller(channel, pool, "grpc.health.v1.Health")
        seen = {
            "services": sorted(database.get_services()),
            "methods": sorted(method.name for method in soe.service.methods),
            "health": health.one("Check", service=SERVICE),
            "created": soe.one(
                "CreateSnapshotGroup", group_name=group, volumes=[volume], prediction_enabled=True
            ),
            "captured": [
                soe.one("CaptureLayer", group_name=group),
                soe.one("CaptureLayer", group_name=group, kind="LAYER_KIND_DIFFERENTIAL"),
            ],
            "status": soe.one("GetSnapshotGroupStatus", group_name=group),
            "verified": soe.stream("VerifyLayers", group_name=group)[-1],
        }
        try:
            soe.one("GetSnapshotGroupStatus", group_name="there-is-none")
            raise SystemExit("a group that does not exist has a status")
        except grpc.RpcError as error:
            seen["refusal"] = {
                "code": error.code().name,
                "message": error.details(),
                "kind": dict(error.trailing_metadata() or ()).get("soe-error-kind"),
            }
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
