"""The process `gorgo ext-proc`: the gRPC service with its health, its status page, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import prometheus_client
from aiohttp import web
from envoy.service.ext_proc.v3 import external_processor_pb2 as pb
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from gorgo_plugin.envoy_ext_proc import memory
from gorgo_plugin.envoy_ext_proc.names import SERVICE
from gorgo_plugin.envoy_ext_proc.processor import Processor
from gorgo_plugin.errors import GorgoError, NoCandidates, PromptError, SettingsError
from gorgo_plugin.runtime import Runtime
from gorgo_plugin.runtime.explain import question
from gorgo_plugin.settings import EnvoySettings, EnvoyTlsSettings, Settings

MESSAGE_OVERHEAD_BYTES = 1 << 20  # of a message over the body in it: headers and attributes
Process = Callable[[Any, Any], Awaitable[None]]

_log = logging.getLogger("gorgo_plugin")


async def serve(
    settings: Settings, read_settings: Callable[[], Settings], ready: Callable[[dict[str, Any]], None]
) -> None:
    """Serve until SIGTERM or SIGINT, and reload the settings on SIGHUP.

    Args:
        settings: in force at the start.
        read_settings: reads them anew; a `SettingsError` leaves the last good ones in force.
        ready: told where the service and the status page listen, once they do.

    Raises:
        GorgoError: an address cannot be bound, or a certificate cannot be read.
    """
    memory.limit_arenas()
    loop, again = asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, again.set)  # while tokenizers load; by default it would end the process
    runtime = Runtime(settings, gateway="envoy")
    processor = Processor(runtime)
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopping.set)
    try:
        async with (
            _status_page(processor) as status_url,
            grpc_service(settings.envoy, processor.process, reads=None) as (server, checks, listening),
        ):
            runtime.ensure_started()
            reloads = functools.partial(_reload, threading.Lock(), runtime, read_settings)
            loop.add_signal_handler(signal.SIGHUP, lambda: loop.run_in_executor(None, reloads))
            if again.is_set():
                loop.run_in_executor(None, reloads)
            ready({"listen": listening, "status": status_url})
            tidying = asyncio.create_task(memory.give_back())
            await stopping.wait()
            tidying.cancel()
            for name in (signal.SIGTERM, signal.SIGINT):  # a second one ends it at once
                loop.remove_signal_handler(name)
            await checks.enter_graceful_shutdown()
            await asyncio.sleep(runtime.settings.envoy.drain_s)
            await server.stop(runtime.settings.envoy.grace_s)
    finally:
        await runtime.stop()


@contextlib.asynccontextmanager
async def grpc_service(
    envoy: EnvoySettings, process: Process, reads: Callable[[bytes], Any] | None = pb.ProcessingRequest.FromString
) -> AsyncIterator[tuple[grpc.aio.Server, Any, str]]:
    """A started server for one `Process` method, with health and reflection: the server, its health, its address.

    `reads` makes of each message what `process` gets of it; None: it gets the bytes.

    Raises:
        GorgoError: the address cannot be bound, or a certificate cannot be read.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", envoy.max_body_bytes + MESSAGE_OVERHEAD_BYTES),
            ("grpc.max_send_message_length", envoy.max_body_bytes + MESSAGE_OVERHEAD_BYTES),
            ("grpc.so_reuseport", 0),  # or a second service would silently take half of the streams
        ]
    )
    # Answers are serialized where they are made: most are constants.
    method = grpc.stream_stream_rpc_method_handler(process, request_deserializer=reads)
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": method}),))
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    listening = _bind(server, envoy)
    await server.start()
    for service in ("", SERVICE):
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    try:
        yield server, checks, listening
    finally:
        await server.stop(None)


def _bind(server: grpc.aio.Server, envoy: EnvoySettings) -> str:
    credentials = None if envoy.tls is None else _credentials(envoy.tls)
    try:
        _try_address(envoy.listen)
        if credentials is None:
            port = server.add_insecure_port(envoy.listen)
        else:
            port = server.add_secure_port(envoy.listen, credentials)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GorgoError(f"envoy.listen: cannot listen on {envoy.listen} ({reason})") from None
    return envoy.listen if envoy.listen.startswith("unix:") else f"{envoy.listen.rpartition(':')[0]}:{port}"


def _try_address(address: str) -> None:
    """Raise `OSError` where gRPC could not listen, which tells why in its log alone.

    A Unix socket it would take away from whoever listens there.
    """
    if address.startswith("unix:"):
        path = Path(address.removeprefix("unix:"))
        path.parent.stat()
        with socket.socket(socket.AF_UNIX) as peer:
            if path.exists() and peer.connect_ex(str(path)) == 0:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        return
    host, _, port = address.rpartition(":")
    family, *_, resolved = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(resolved)


def _credentials(tls: EnvoyTlsSettings) -> grpc.ServerCredentials:
    key, certificate = _pem(tls.key_file, "key_file"), _pem(tls.cert_file, "cert_file")
    clients = None if tls.client_ca_file is None else _pem(tls.client_ca_file, "client_ca_file")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.cert_file, tls.key_file, password="")
    except (ssl.SSLError, OSError):
        pair = f"{tls.cert_file} and {tls.key_file}"
        raise SettingsError(f"envoy.tls.cert_file, key_file: {pair} are no PEM certificate and its key") from None
    return grpc.ssl_server_credentials([(key, certificate)], clients, require_client_auth=clients is not None)


def _pem(path: str, field: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"envoy.tls.{field}: cannot read {path} ({error.strerror})") from None


def _reload(lock: threading.Lock, runtime: Runtime, read_settings: Callable[[], Settings]) -> None:
    """Put the settings of the file into force; where the service listens is decided at its start.

    One reload at a time: the last signal's is the last to be read.
    """
    with lock:
        try:
            settings = read_settings()
        except SettingsError as error:
            runtime.refuse(str(error))
            return
        with contextlib.suppress(SettingsError):  # logged, counted and shown by the runtime
            runtime.reload(settings)
            runtime.set_active(settings.mode != "off", f"mode is {settings.mode}")
            runtime.ensure_started()
            _log.info("gorgo: settings reloaded")


# The status page


@contextlib.asynccontextmanager
async def _status_page(processor: Processor) -> AsyncIterator[str | None]:
    """Serve metrics, status and explanations; its URL, None where it is not wanted."""
    address = processor.runtime.settings.envoy.status_listen
    if address is None:
        yield None
        return
    app = web.Application(client_max_size=processor.runtime.settings.envoy.max_body_bytes)
    app["processor"] = processor
    app.add_routes(
        [web.get("/metrics", _metrics), web.get("/gorgo/status", _status), web.post("/gorgo/explain", _explain)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    host, _, port = address.rpartition(":")
    try:
        await web.TCPSite(runner, host.strip("[]"), int(port)).start()
        yield f"http://{host}:{runner.addresses[0][1]}"
    except OSError as error:
        raise GorgoError(f"envoy.status_listen: cannot listen on {address} ({error.strerror or error})") from None
    finally:
        await runner.cleanup()


async def _metrics(_request: web.Request) -> web.Response:
    text = await asyncio.to_thread(prometheus_client.generate_latest)
    return web.Response(body=text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})


async def _status(request: web.Request) -> web.Response:
    processor: Processor = request.app["processor"]
    return web.json_response({**processor.runtime.status(), "streams": processor.streams})


async def _explain(request: web.Request) -> web.Response:
    processor: Processor = request.app["processor"]
    try:
        asked = await request.json()
    except (ValueError, RecursionError):
        return web.json_response({"error": "body: expected JSON"}, status=400)
    try:
        return web.json_response(await processor.runtime.explain(*question(asked)))
    except (PromptError, NoCandidates) as error:
        return web.json_response({"error": str(error)}, status=400)
