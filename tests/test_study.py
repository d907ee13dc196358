"""Studies: their form, and that each runs at smoke scale through the command line."""

import json

import pytest
from typer.testing import CliRunner

import allrounder as ar
from allrounder.cli import app
from allrounder.study import Claim, Finding, draws, run_study


def test_claims_say_what_they_need():
    assert Claim.at_least("a", 2.0, 1).holds
    assert not Claim.at_least("a", 0.99, 1).holds
    assert Claim.at_most("a", 1.0, 1, "% of b") == Claim("a", "<= 1 % of b", 1.0, True)
    assert not Claim.at_least("a", float("nan"), 1).holds
    assert not Finding([Claim.at_least("a", 2.0, 1), Claim.at_most("b", 2.0, 1)]).holds
    assert draws("laptop", 2) == [2, 1002, 2002]


def test_unknown_studies_and_scales_are_named():
    with pytest.raises(ar.InputError, match="one of smoke, laptop, full, got 'huge'"):
        run_study("tall-masks", scale="huge")
    with pytest.raises(ar.InputError, match="did you mean 'tall-masks'"):
        run_study("tall-mask")


@pytest.mark.parametrize("slug", list(ar.papers()))
def test_every_study_runs(slug):
    result = CliRunner().invoke(app, ["study", slug, "--scale", "smoke", "--seed", "0", "--json"])
    found = json.loads(result.stdout)
    assert list(found)[:5] == ["slug", "scale", "seed", "seconds", "claims"]
    assert found["claims"]
    for claim in found["claims"]:
        assert list(claim) == ["text", "expected", "measured", "holds"]
    assert result.exit_code == (0 if all(claim["holds"] for claim in found["claims"]) else 1)
    assert any(claim["holds"] for claim in found["claims"])
    assert found["tables"]
    assert found["versions"]["torch"]
