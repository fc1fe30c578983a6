"""The one table of tolerances: the largest error that is rounding, relative to the tensor's largest value.

An output is rounded once to its dtype, after arithmetic in float32 or float64. Gradients of parameters are sums over
a channel, kept in double and rounded once.
"""

import torch

RTOL = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.float16: 2e-3,  # 2^-10 for one rounding, twice where a rounded output decides what a gradient multiplies
    torch.bfloat16: 1.6e-2,  # 2^-7, likewise
}


def assert_close(actual, expected, dtype, scale=1.0, name=""):
    """actual, computed in ``dtype``, equals the float64 ``expected`` within ``scale`` times the table."""
    expected = expected.to(torch.float64)
    magnitude = expected.abs().max().item() if expected.numel() else 0.0
    tolerance = scale * RTOL[dtype] * max(magnitude, 1e-30)
    torch.testing.assert_close(
        actual.detach().to(torch.float64), expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )
