"""``python -m resnet_fused --check`` and ``--json``."""

import json

import pytest

from resnet_fused import __main__, autograd, backend, reference, selfcheck


@pytest.fixture(autouse=True)
def only_the_cpus(monkeypatch):
    monkeypatch.setattr(selfcheck, "all_backends", lambda: [backend.get("cpu"), backend.get("eager")])


def _run(capsys, *arguments):
    status = __main__.main(list(arguments))
    return status, capsys.readouterr().out


def test_every_dtype_and_layout_of_a_backend_is_checked(capsys):
    status, text = _run(capsys, "--check", "--json")
    checks = json.loads(text)["checks"]
    dtypes = ("float32", "float64", "bfloat16", "float16")
    cases = {(dtype, layout) for dtype in dtypes for layout in ("contiguous", "channels_last")}
    assert {(entry["dtype"], entry["layout"]) for entry in checks} == cases and len(checks) == len(cases)
    assert all(entry["mismatch"] is None and 0 < entry["error"] <= entry["limit"] for entry in checks)
    assert status == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("added", selfcheck.ADDED)
def test_a_wrong_value_is_a_mismatch(added, training, capsys, monkeypatch):
    right = reference.batch_norm_add_relu

    def wrong_there(input, residual, batch_norm, residual_batch_norm, is_training, *others):
        what = selfcheck.ADDED[(residual is not None) + (residual_batch_norm is not None)]
        factor = 1.1 if (what, is_training) == (added, training) else 1
        return right(input, residual, batch_norm, residual_batch_norm, is_training, *others) * factor

    monkeypatch.setattr(reference, "batch_norm_add_relu", wrong_there)
    status, text = _run(capsys, "--check")
    assert status == 1 and text.count("MISMATCH: output is off by") == 8
    assert text.count(f"; added: {added}; training={training}") == 8


def test_a_call_that_eager_serves_is_a_mismatch(capsys, monkeypatch):
    monkeypatch.setattr(autograd, "attempt", lambda *arguments: None)
    status, text = _run(capsys, "--check")
    assert status == 1 and text.count("MISMATCH: RuntimeError: PyTorch's own operators ran") == 8


def test_json_says_what_the_report_does(capsys):
    status, text = _run(capsys, "--json")
    written = json.loads(text)
    assert status == 0 and "checks" not in written
    assert {entry["name"] for entry in written["backends"]} >= {"cpu", "cuda", "triton", "eager"}


def test_with_no_backend_nothing_is_checked(capsys, monkeypatch):
    monkeypatch.setattr(selfcheck, "all_backends", lambda: [backend.get("eager")])
    status, text = _run(capsys, "--check")
    assert status == 0 and "no backend to check" in text
