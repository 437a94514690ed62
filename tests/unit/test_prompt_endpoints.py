"""Which paths hold a prompt."""

import pytest

from gorgo_plugin.prompt import ENDPOINTS, endpoint_of


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_known_path_names_itself(path: str) -> None:
    assert endpoint_of(path) == path


@pytest.mark.parametrize(
    "path",
    ["/chat/completions", "/v1/chat/completions/", "/v1/chat/completions?api-version=1", "/chat/completions/?a=/x"],
)
def test_version_trailing_slash_and_query_do_not_matter(path: str) -> None:
    assert endpoint_of(path) == "/v1/chat/completions"


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/models", "/v1/messages/count_tokens", "/v2/chat/completions"])
def test_a_path_without_a_prompt_is_none(path: str) -> None:
    assert endpoint_of(path) is None
