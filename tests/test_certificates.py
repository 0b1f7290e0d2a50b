"""What a certificate says, when it is void, and that it survives the way through files."""

from __future__ import annotations

import dataclasses
import doctest
import json

import pytest

from shallowdeep import certificates
from shallowdeep.certificates import Certificate, certificate_from_json, claim_of
from shallowdeep.policies import CalibrationRecord, Fixed
from shallowdeep.spelling import from_json, to_json

PROVED = Certificate(
    method="ltt",
    test="exact paired test, fixed sequence",
    risk="drop",
    bound=0.005,
    delta=0.05,
    observed=0.001,
    rows=5000,
    tested_rows=3500,
    data_hash="0123456789abcdef",
    backend="onnxruntime",
    precision="torch.float32",
    weights="feed",
    exit_names=("a", "b", "full"),
    asked_E=(True, False, True),
    view="",
    versions="shallowdeep 0",
)
HERE = {"backend": "onnxruntime", "precision": "torch.float32", "weights": "feed", "view": ""}
HERE |= {"exit_names": ("a", "b", "full")}


def test_what_it_says() -> None:
    assert PROVED.sentence.startswith(
        "With probability at least 0.95 over the draw of calibration rows the accuracy is at most 0.50% of all rows "
        "below the full network's."
    )
    assert "delta is divided" in PROVED.sentence
    mean = dataclasses.replace(PROVED, method="crc", delta=None)
    assert "In expectation" in mean.sentence
    assert "a single draw may miss it" in mean.sentence
    for words in ("drop <= 0.005, delta 0.05", "3500 of 5000 rows", "onnxruntime, torch.float32", "a full"):
        assert words in str(PROVED)


def test_no_drop_and_a_gain_are_said_as_such() -> None:
    assert claim_of("drop", 0.0) == "the policy is at least as accurate as the full network"
    assert "0.002 of all rows more often right" in claim_of("drop", -0.002)
    assert claim_of("harm", 0.01).startswith("at most 1.00% of the rows are right at the full exit")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"backend": "torch"}, "tested on backend 'onnxruntime' and 'torch' runs"),
        ({"precision": "torch.bfloat16"}, "tested in torch.float32 and torch.bfloat16 runs"),
        ({"weights": "f00d"}, "tested with other weights of the backbone or its ICs"),
        ({"exit_names": ("a", "full")}, "tested on the exits a, b, full and a, full run"),
        ({"view": "mirror"}, "second look 'none' and 'mirror' runs"),
        ({"capped": True}, "a hard cap"),
    ],
)
def test_it_is_void_elsewhere(change: dict, reason: str) -> None:
    assert PROVED.void_for(**HERE) is None
    assert reason in PROVED.void_for(**{**HERE, **change})


def test_a_trace_that_does_not_say_what_made_it_proves_nothing_about_an_engine() -> None:
    for unknown in ("backend", "precision", "weights"):
        assert "does not say" in dataclasses.replace(PROVED, **{unknown: ""}).void_for(**{**HERE, unknown: ""})


def test_it_travels_with_its_policy() -> None:
    policy = Fixed(exit=1, calibrated_on=CalibrationRecord(info={"rows": 5000}, certificate=PROVED))
    again = from_json(json.loads(json.dumps(to_json(policy), allow_nan=False)))
    assert again.calibrated_on == policy.calibrated_on
    assert again.calibrated_on.certificate.sentence == PROVED.sentence
    with pytest.raises(ValueError, match="A certificate has the fields asked_E, backend"):
        certificate_from_json({"risk": "drop"})


def test_the_examples_run() -> None:
    assert doctest.testmod(certificates).failed == 0
