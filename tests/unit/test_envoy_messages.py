"""The protocol's messages: what is read from them, and the answers."""

from __future__ import annotations

from typing import Any

import pytest
from envoy.config.core.v3.base_pb2 import HeaderValueOption, Metadata
from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from google.protobuf import text_format
from google.protobuf.message import DecodeError

from gorgo_plugin.envoy_ext_proc import messages
from gorgo_plugin.envoy_ext_proc.messages import Head, Served
from gorgo_plugin.envoy_ext_proc.names import ATTEMPT_KEY, METADATA_NAMESPACE
from gorgo_plugin.prompt.endpoints import CHAT

ATTRIBUTES = "envoy.filters.http.ext_proc"


def request(headers: dict[str, str], end: bool = False, raw: bool = True) -> Any:
    message = pb.ProcessingRequest()
    message.request_headers.end_of_stream = end
    for name, value in headers.items():
        message.request_headers.headers.headers.add(
            key=name, **({"raw_value": value.encode()} if raw else {"value": value})
        )
    return message


def answered(status: str, **attributes: Any) -> Any:
    message = pb.ProcessingRequest()
    message.response_headers.headers.headers.add(key=":status", raw_value=status.encode())
    for name, value in attributes.items():
        field = message.attributes[ATTRIBUTES].fields[name.replace("__", ".")]
        if isinstance(value, str):
            field.string_value = value
        else:
            field.number_value = value
    return message


def named(replica: str) -> str:
    metadata = Metadata()
    metadata.filter_metadata["gorgo"].fields["replica"].string_value = replica
    return text_format.MessageToString(metadata)


def response(answer: bytes) -> Any:
    return pb.ProcessingResponse.FromString(answer)


def headers_of(common: Any) -> dict[str, str]:
    """The headers that are set; all overwrite what a client or an engine sent."""
    options = common.header_mutation.set_headers
    assert all(option.append_action == HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD for option in options)
    return {option.header.key: option.header.raw_value.decode() for option in options}


@pytest.mark.parametrize("raw", [True, False])
def test_the_head_of_a_request_that_holds_a_prompt_is_read(raw: bool) -> None:
    headers = {":method": "POST", ":path": f"{CHAT}?v=1", "content-encoding": "gzip", "accept": "*/*"}
    assert messages.read_head(request(headers, raw=raw)) == Head(CHAT, "gzip")


@pytest.mark.parametrize(
    ("method", "path", "end"),
    [("GET", CHAT, False), ("POST", "/v1/models", False), ("POST", CHAT, True), ("", "", False)],
)
def test_other_requests_have_no_head(method: str, path: str, end: bool) -> None:
    assert messages.read_head(request({":method": method, ":path": path}, end)) is None


def test_a_header_that_is_no_utf8_is_read_all_the_same() -> None:
    message = request({":method": "POST", ":path": CHAT})
    message.request_headers.headers.headers.add(key="content-encoding", raw_value=b"\xff")
    head = messages.read_head(message)
    assert head is not None
    assert head.encoding == "ÿ"


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 300_000])
def test_a_body_of_any_size_is_read_whole(size: int) -> None:
    message = pb.ProcessingRequest()
    message.request_body.body, message.request_body.end_of_stream = bytes(range(256)) * (size // 256 + 1), True
    message.request_body.body = message.request_body.body[:size]
    received = messages.read(message.SerializeToString())
    assert received == ("request_body", message.request_body.body, None)


def test_headers_that_came_before_are_told_apart_from_others() -> None:
    wanted = {CHAT: Head(CHAT, ""), "/v1/models": None, f"{CHAT}?key=secret": Head(CHAT, "")}
    for _ in range(2):
        for path, head in wanted.items():
            raw = request({":method": "POST", ":path": path}).SerializeToString()
            assert messages.read(raw) == ("request_headers", head, None)
    assert messages.read(answered("503").SerializeToString()).content == Served(503, None, 1, "")


def test_nothing_that_may_hold_a_secret_is_kept() -> None:
    before = messages._read_alike.cache_info().currsize
    messages.read(request({":method": "POST", ":path": f"{CHAT}?key=secret"}).SerializeToString())
    body = pb.ProcessingRequest()
    body.request_body.body = b"{}"
    messages.read(body.SerializeToString())
    assert messages._read_alike.cache_info().currsize == before


def test_of_an_observed_piece_its_text_and_its_place_are_read() -> None:
    for ends in (False, True):
        message = pb.ProcessingRequest(observability_mode=True)
        message.response_body.body, message.response_body.end_of_stream = b"data: \x10\x01", ends
        raw = message.SerializeToString()
        assert messages.read(raw) == ("response_body", None, "")
        assert (messages.text_of_piece(raw), messages.is_last_piece(raw)) == (b"data: \x10\x01", ends)


@pytest.mark.parametrize(
    ("raw", "piece"),
    [
        (b"\x2a\x00", (b"", False)),
        (b"\x2a\x02\x10\x01", (b"", True)),
        (b"\x2a\x05\x10\x01\x0a\x01x", (b"x", True)),  # in another order
        (b"\x2a\x07\x0a\x01x\x10\x00\x10\x01", (b"x", True)),  # twice; the last one counts
        (b"\x2a\x85\x00\x0a\x01x\x10\x01", (b"x", True)),  # a length in more bytes than it takes
        (b"\x2a\x07\x0a\x01x\x10\x01\x18\x01", (b"x", True)),  # a field that is not looked at
        (b"\x3a\x04\x0a\x02\x10\x01", (b"", False)),  # trailers
    ],
)
def test_a_piece_is_read_however_it_is_written(raw: bytes, piece: tuple[bytes, bool]) -> None:
    body = pb.ProcessingRequest.FromString(raw).response_body
    assert (body.body, body.end_of_stream) == piece
    assert (messages.text_of_piece(raw), messages.is_last_piece(raw)) == piece


@pytest.mark.parametrize(
    "raw", [b'"', b"\x22\x80", b"\x22\x05\x0a\x01", b"\x22\x02\x0a\x80", b"\x22" + b"\xff" * 100_000]
)
def test_a_message_that_is_cut_off_is_none(raw: bytes) -> None:
    with pytest.raises(DecodeError):
        messages.read(raw)


def test_whose_answer_a_piece_belongs_to_is_found_unread() -> None:
    message = pb.ProcessingRequest(observability_mode=True)
    message.response_body.body = b"data: 0badcafe-000000000001 and more"
    metadata = message.metadata_context.filter_metadata[METADATA_NAMESPACE]
    metadata.fields[ATTEMPT_KEY].string_value = "0badcafe-000000000042"
    raw = message.SerializeToString()
    assert messages.attempt_of_piece(raw, b"0badcafe-", 21) == messages.attempt_id(message) == "0badcafe-000000000042"
    assert messages.attempt_of_piece(raw, b"12345678-", 21) is None
    headers = answered("200")
    headers.metadata_context.CopyFrom(message.metadata_context)
    assert messages.attempt_of_piece(headers.SerializeToString(), b"0badcafe-", 21) is None


def test_what_is_no_message_is_refused() -> None:
    for raw in (b"\xff" * 50, b'"\xff\xff', b'"\x05\x0a\x7fab'):
        with pytest.raises(DecodeError):
            messages.read(raw)


def test_who_answered_is_read_from_the_attributes() -> None:
    message = answered(
        "200",
        xds__upstream_host_metadata=named('odd "name" ü'),
        upstream__request_attempt_count=3,
        response__code_details="via_upstream",
    )
    assert messages.read_served(message) == Served(200, 'odd "name" ü', 3, "via_upstream")


@pytest.mark.parametrize(
    "metadata", ["", "}{", named("x").replace("gorgo", "other"), named("").replace("replica", "x")]
)
def test_without_a_name_nobody_is_known_to_have_answered(metadata: str) -> None:
    served = messages.read_served(answered("503", xds__upstream_host_metadata=metadata))
    assert served.replica is None
    assert served.status == 503


def test_an_answer_without_attributes_is_one_attempt() -> None:
    assert messages.read_served(answered("200")) == Served(200, None, 1, "")


def test_a_status_that_is_no_number_is_none() -> None:
    assert messages.read_served(answered("odd")).status == 0


def test_a_request_is_sent_to_its_replica_and_named_to_the_observing_stream() -> None:
    answer = response(messages.routed("near", "", "boot-1", None))
    common = answer.request_body.response
    assert common.clear_route_cache
    assert headers_of(common) == {"x-gorgo-replica": "near"}
    assert not common.HasField("body_mutation")

    observed = pb.ProcessingRequest()
    observed.metadata_context.filter_metadata["gorgo"].CopyFrom(answer.dynamic_metadata.fields["gorgo"].struct_value)
    assert messages.attempt_id(observed) == "boot-1"


def test_a_changed_body_comes_with_its_length() -> None:
    common = response(messages.routed("near", "", "boot-1", b"{}")).request_body.response
    assert common.body_mutation.body == b"{}"
    assert headers_of(common)["content-length"] == "2"


def test_where_envoy_picks_by_address_it_gets_the_whole_list() -> None:
    common = response(messages.routed("near", "10.0.0.1:80,10.0.0.2:80", "boot-1", None)).request_body.response
    assert headers_of(common)["x-gateway-destination-endpoint"] == "10.0.0.1:80,10.0.0.2:80"


def test_a_request_that_is_only_observed_stays_where_it_is() -> None:
    answer = response(messages.observed("boot-1"))
    common = answer.request_body.response
    assert not common.clear_route_cache
    assert headers_of(common) == {}
    assert "gorgo" in answer.dynamic_metadata.fields


def test_an_observed_message_of_another_request_has_no_id() -> None:
    assert messages.attempt_id(pb.ProcessingRequest()) == ""


def test_headers_are_added_to_the_answer() -> None:
    answer = response(messages.answer_headers({"x-gorgo-region": "east"}))
    assert headers_of(answer.response_headers.response) == {"x-gorgo-region": "east"}
    assert not response(messages.answer_headers({})).response_headers.response.HasField("header_mutation")


def test_more_time_is_asked_for_in_whole_milliseconds() -> None:
    timeout = response(messages.more_time(2.5004)).override_message_timeout
    assert timeout.ToMilliseconds() == 2500


@pytest.mark.parametrize("kind", messages.UNCHANGED)
def test_an_unchanged_answer_is_of_the_kind_that_was_asked(kind: str) -> None:
    answer = response(messages.UNCHANGED[kind])
    assert answer.WhichOneof("response") == kind
    assert answer.ByteSize() == 2


def test_of_what_is_not_ours_envoy_sends_nothing_more() -> None:
    mode = response(messages.NOT_OURS).mode_override
    assert mode.request_body_mode == mode.response_body_mode == ProcessingMode.NONE
    assert mode.response_header_mode == ProcessingMode.SKIP
