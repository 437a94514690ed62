"""The paths whose bodies hold a prompt."""

from __future__ import annotations

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
EMBEDDINGS = "/v1/embeddings"
MESSAGES = "/v1/messages"

ENDPOINTS = (CHAT, COMPLETIONS, RESPONSES, EMBEDDINGS, MESSAGES)

_BY_PATH = {path: path for path in ENDPOINTS} | {path.removeprefix("/v1"): path for path in ENDPOINTS}


def endpoint_of(path: str) -> str | None:
    """The endpoint a request path means, None when it holds no prompt.

    `/v1` may be missing; a query string, a fragment and trailing slashes are ignored.
    """
    known = _BY_PATH.get(path)
    if known is not None:  # as it mostly is
        return known
    bare = path.split("?", 1)[0].split("#", 1)[0].rstrip("/")
    return _BY_PATH.get(bare)
