"""The protocol's messages: what is read from them, and the few answers there are."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption, Metadata
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf import text_format
from google.protobuf.duration_pb2 import Duration

from gorgo_plugin.envoy_ext_proc.names import (
    ATTEMPT_KEY,
    ATTEMPTS,
    CODE_DETAILS,
    DESTINATION_HEADER,
    METADATA_NAMESPACE,
    REPLICA_HEADER,
    REPLICA_KEY,
    UPSTREAM_METADATA,
)
from gorgo_plugin.prompt.endpoints import endpoint_of

Message = Any  # a ProcessingRequest; the generated module has no types

_OVERWRITE = HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
_ATTRIBUTES = "envoy.filters.http.ext_proc"  # the one namespace under which Envoy sends attributes

# Answers that change nothing, serialized once.
UNCHANGED: dict[str, bytes] = {
    "request_headers": pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString(),
    "request_body": pb.ProcessingResponse(request_body=pb.BodyResponse()).SerializeToString(),
    "request_trailers": pb.ProcessingResponse(request_trailers=pb.TrailersResponse()).SerializeToString(),
    "response_headers": pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString(),
    "response_body": pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString(),
    "response_trailers": pb.ProcessingResponse(response_trailers=pb.TrailersResponse()).SerializeToString(),
}
# To request headers: nothing more of this request is of interest.
NOT_OURS: bytes = pb.ProcessingResponse(
    request_headers=pb.HeadersResponse(),
    mode_override=ProcessingMode(
        request_body_mode=ProcessingMode.NONE,
        response_header_mode=ProcessingMode.SKIP,
        response_body_mode=ProcessingMode.NONE,
    ),
).SerializeToString()


# How Envoy begins messages with the headers of a request and of an answer, and with their bodies, and what marks the
# end of a body.
_REQUEST_HEADERS, _ANSWER_HEADERS, _REQUEST_BODY, _ANSWER_BODY = b"\x12", b"\x1a", b"\x22", b"\x2a"
_END = b"\x10\x01"
_BODY = b"\x0a"  # of the body inside its field
# Headers are the same for most requests, as no more of them is forwarded than matters: longer ones are read each time.
_ALIKE_BYTES = 512


class Head(NamedTuple):
    """What of a request's headers matters.

    Attributes:
        endpoint: one of the paths whose bodies hold a prompt.
        encoding: how its body is compressed, "" when it is not.
    """

    endpoint: str
    encoding: str


class Served(NamedTuple):
    """What Envoy tells with an answer's headers.

    Attributes:
        status: HTTP status.
        replica: who answered; None when Envoy itself did, or when its endpoints carry no names.
        attempts: how often Envoy tried.
        details: Envoy's word on where the answer came from.
    """

    status: int
    replica: str | None
    attempts: int
    details: str


class Received(NamedTuple):
    """A message of Envoy's.

    Attributes:
        kind: which of the protocol's requests.
        content: what matters of it: of a request's headers and an answer's as `read_head` and `read_served` tell, of
            a request's body its bytes.
        attempt: `attempt_id` of an observed one, which awaits no answer; None where one is awaited.
    """

    kind: str
    content: Head | Served | bytes | None
    attempt: str | None


def read(raw: bytes) -> Received:
    """A message as it came over the wire.

    Raises:
        DecodeError: it is none.
    """
    # What a path's query holds may be a secret, and a body is one: neither is kept.
    tag = raw[:1]
    if tag == _REQUEST_BODY and (cut := _cut_body(raw, tag)) is not None:
        return Received("request_body", cut[0], None)
    alike = tag == _ANSWER_HEADERS or (tag == _REQUEST_HEADERS and b"?" not in raw)
    return _read_alike(raw) if alike and len(raw) <= _ALIKE_BYTES else _read(raw)


def _cut_body(raw: bytes, tag: bytes) -> tuple[bytes, bool] | None:
    """(the body in a message that begins with one, whether it is the last piece), as Envoy writes it: the fields in
    their order, each once. None where something else is there.

    Parsing would copy a body twice more, through a fresh arena, and read the metadata that follows it.
    """
    if raw[:1] != tag:
        return None
    try:
        size, start = _varint(raw, 1)
        end, size = start + size, 0
        if raw[start : start + 1] == _BODY:
            size, start = _varint(raw, start + 1)
    except IndexError:
        return None
    after = raw[start + size : end]
    if start + size > end or end > len(raw) or after not in (b"", _END):
        return None
    return raw[start : start + size], after == _END


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """(a number as protobuf writes it, where what follows begins).

    Raises:
        IndexError: it is cut off.
    """
    number = shift = 0
    while (byte := raw[at]) > 0x7F and shift < 64:
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return number | byte << shift, at + 1


def _read(raw: bytes) -> Received:
    message = pb.ProcessingRequest.FromString(raw)
    kind, content = message.WhichOneof("request"), None
    if kind == "request_body":
        content = message.request_body.body
    elif kind == "request_headers":
        content = read_head(message)
    elif kind == "response_headers":
        content = read_served(message)
    return Received(kind, content, attempt_id(message) if message.observability_mode else None)


# An answer's have the second in them, so that those of some seconds ago do not come again.
_read_alike = functools.lru_cache(maxsize=256)(_read)


def read_head(message: Message) -> Head | None:
    """The head of a request that holds a prompt; None for everything else."""
    headers = message.request_headers
    fields = _fields(headers, (":method", ":path", "content-encoding"))
    endpoint = endpoint_of(fields[":path"])
    if fields[":method"] != "POST" or endpoint is None or headers.end_of_stream:
        return None
    return Head(endpoint, fields["content-encoding"])


def read_served(message: Message) -> Served:
    """What became of a request, from the message with its answer's headers."""
    attributes = message.attributes[_ATTRIBUTES].fields if _ATTRIBUTES in message.attributes else {}
    status = _fields(message.response_headers, (":status",))[":status"]
    attempts = attributes[ATTEMPTS].number_value if ATTEMPTS in attributes else 1.0
    details = attributes[CODE_DETAILS].string_value if CODE_DETAILS in attributes else ""
    replica = _replica(attributes[UPSTREAM_METADATA].string_value) if UPSTREAM_METADATA in attributes else None
    return Served(int(status) if status.isdecimal() else 0, replica, max(int(attempts), 1), details)


def attempt_id(message: Message) -> str:
    """The id that `routed` gave to the request that an observed message belongs to; "" without one."""
    known = message.metadata_context.filter_metadata
    return known[METADATA_NAMESPACE].fields[ATTEMPT_KEY].string_value if METADATA_NAMESPACE in known else ""


def attempt_of_piece(raw: bytes, begins: bytes, length: int) -> str | None:
    """The same of an observed piece of an answer, unread: an id of `length` bytes that begins so; None without one."""
    at = raw.rfind(begins) if raw[:1] == _ANSWER_BODY else -1  # metadata follows the body
    return raw[at : at + length].decode("latin-1") if at >= 0 else None


def text_of_piece(raw: bytes) -> bytes:
    """The piece itself in an observed message with a piece of an answer."""
    text, _ = _cut_body(raw, _ANSWER_BODY) or _read_body(raw)
    return text


def is_last_piece(raw: bytes) -> bool:
    """Whether such a message has the last of its answer. They are many, so most are not read for it."""
    if _END not in raw:
        return False
    _, last = _cut_body(raw, _ANSWER_BODY) or _read_body(raw)
    return last


def _read_body(raw: bytes) -> tuple[bytes, bool]:
    body = pb.ProcessingRequest.FromString(raw).response_body
    return body.body, body.end_of_stream


def routed(replica: str, destinations: str, attempt: str, body: bytes | None) -> bytes:
    """The answer to a request's body: go there.

    Args:
        replica: the chosen one's name.
        destinations: addresses in order of preference, "" where Envoy does not pick by address.
        attempt: names the request to the observing stream.
        body: what to send in place of the body; None leaves it.
    """
    # Messages of protobuf are merged by writing one after the other, so what stays the same is written once.
    if body is None:
        return _directions(replica, destinations) + _remembered(attempt)
    response = pb.ProcessingResponse.FromString(_directions(replica, destinations))
    common = response.request_body.response
    common.body_mutation.body = body
    _set(common, "content-length", str(len(body)))  # Envoy answers 500 when the client's does not fit
    return bytes(response.SerializeToString()) + _remembered(attempt)


def observed(attempt: str) -> bytes:
    """The answer to a request's body that stays where it is; the observing stream learns its name."""
    return UNCHANGED["request_body"] + _remembered(attempt)


@functools.lru_cache(maxsize=1024)
def _directions(replica: str, destinations: str) -> bytes:
    response = pb.ProcessingResponse()
    common = response.request_body.response
    common.clear_route_cache = True
    _set(common, REPLICA_HEADER, replica)
    if destinations:
        _set(common, DESTINATION_HEADER, destinations)
    return bytes(response.SerializeToString())


def _remembered(attempt: str) -> bytes:
    return _remembering(len(attempt)).replace(b"~" * len(attempt), attempt.encode())


@functools.lru_cache(maxsize=64)
def _remembering(chars: int) -> bytes:
    """The dynamic metadata of an attempt whose id has so many characters, each of them `~`."""
    response = pb.ProcessingResponse()
    own = response.dynamic_metadata.fields[METADATA_NAMESPACE].struct_value
    own.fields[ATTEMPT_KEY].string_value = "~" * chars
    return bytes(response.SerializeToString())


def answer_headers(headers: Mapping[str, str]) -> bytes:
    """The answer to an answer's headers: add these."""
    return _answer_headers(tuple(headers.items()))


@functools.lru_cache(maxsize=1024)
def _answer_headers(headers: tuple[tuple[str, str], ...]) -> bytes:
    response = pb.ProcessingResponse()
    common = response.response_headers.response
    for name, value in headers:
        _set(common, name, value)
    return bytes(response.SerializeToString())


def more_time(seconds: float) -> bytes:
    """Ask Envoy to wait so much longer for the answer to the message it sent last."""
    timeout = Duration()
    timeout.FromMilliseconds(round(seconds * 1e3))
    return bytes(pb.ProcessingResponse(override_message_timeout=timeout).SerializeToString())


def _set(common: Any, name: str, value: str) -> None:
    if not value.isprintable():  # told to set what is no header, Envoy answers 500
        return
    common.header_mutation.set_headers.append(
        HeaderValueOption(header=HeaderValue(key=name, raw_value=value.encode()), append_action=_OVERWRITE)
    )


def _fields(headers: Any, names: tuple[str, ...]) -> dict[str, str]:
    found = dict.fromkeys(names, "")
    for header in headers.headers.headers:
        if header.key in found:
            found[header.key] = header.value or header.raw_value.decode("latin-1")
    return found


@functools.lru_cache(maxsize=1024)
def _replica(metadata: str) -> str | None:
    """The name in an endpoint's metadata, which Envoy sends in protobuf's text format."""
    try:
        known = text_format.Parse(metadata, Metadata()).filter_metadata
    except text_format.ParseError:
        return None
    own = known[METADATA_NAMESPACE].fields if METADATA_NAMESPACE in known else {}
    return own[REPLICA_KEY].string_value if REPLICA_KEY in own else None
