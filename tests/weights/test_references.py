"""References: what is accepted and how a mistake is explained."""

import pytest

from eqvae_jax.weights import WeightsError, parse_reference


def test_kind_and_rest_are_split_at_the_first_colon():
    assert parse_reference("diffusers:org/name") == ("diffusers", "org/name")
    assert parse_reference("ldm:C:/x.ckpt") == ("ldm", "C:/x.ckpt")
    assert str(parse_reference("init:sd")) == "init:sd"
    assert parse_reference("dit:a.pt", {"dit": "dit:FILE"}).rest == "a.pt"


@pytest.mark.parametrize("reference, problem", [
    ("difusers:x", "there is no kind 'difusers', did you mean 'diffusers'?"),
    ("zzz:x", "there is no kind 'zzz'. The kinds are"),
    ("some/dir", "'some/dir' does not say what it is: write KIND:some/dir"),
    ("ldm:", "'ldm:' names nothing after ldm:"),
    ("", "does not say what it is"),
])
def test_a_mistake_lists_the_kinds(reference, problem):
    with pytest.raises(WeightsError) as error:
        parse_reference(reference)
    message = str(error.value)
    assert problem in message
    assert all(f"\n  {kind}:" in message for kind in ("diffusers", "ldm", "taming", "workdir", "init"))
