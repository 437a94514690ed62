"""A key given twice is a mistake in every mapping of a file."""

from __future__ import annotations

import pytest
import yaml

from gorgo_plugin.envoy_ext_proc.unique_keys import load_yaml


def test_plain_yaml_is_read_as_ever() -> None:
    text = "base: &base {a: 1, b: 2}\nown:\n  <<: *base\n  b: 3\nlist: [{a: 1}, {a: 2}]\n"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3\n", "list:\n  - {x: 1, a: 1, a: 2}\n"])
def test_a_key_given_twice_is_named(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="the key 'a' twice"):
        load_yaml(text)
