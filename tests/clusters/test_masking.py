"""Secrets are found as what they are, not as JSON would write them."""

import json

import pytest

from meshwright.clusters.masking import Mask


@pytest.mark.parametrize("secret", ["tok-123", 'a "quoted" one', "back\\slash", "s\u00f8 h\u00e9", "two\nlines"])
def test_no_value_and_no_key_inside_of_what_goes_out_as_json_holds_a_secret(secret: str) -> None:
    told = {"files": [{secret: 1, "why": f"refused {secret}!"}, (secret, None, 2.5)]}
    hidden = json.loads(json.dumps(Mask([secret]).inside(told)))
    shown = "\n".join("***" for _ in secret.splitlines())
    assert hidden == {"files": [{shown: 1, "why": f"refused {shown}!"}, [shown, None, 2.5]]}
