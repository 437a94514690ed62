"""What the service and the envoy.yaml written for it call by the same name."""

from __future__ import annotations

REPLICA_HEADER = "x-gorgo-replica"
DESTINATION_HEADER = "x-gateway-destination-endpoint"  # as the Gateway API Inference Extension names it

# Dynamic metadata that joins the two streams of a request, and endpoint metadata that names the replica.
METADATA_NAMESPACE = "gorgo"
ATTEMPT_KEY = "attempt"
REPLICA_KEY = "replica"

# gRPC metadata of a stream, by which envoy.yaml tells the service to list destinations.
PICK_KEY = "gorgo-pick"
PICK_DESTINATIONS = "destinations"

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"

# Attributes of a response that Envoy is asked for (the CEL names of its documentation).
UPSTREAM_METADATA = "xds.upstream_host_metadata"
ATTEMPTS = "upstream.request_attempt_count"
CODE_DETAILS = "response.code_details"
