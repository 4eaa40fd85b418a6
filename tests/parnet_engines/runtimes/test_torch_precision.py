"""TF32 is allowed or forbidden whatever the process has set, which is there again afterwards."""

from __future__ import annotations

import pytest
import torch

from parnet_engines.runtimes.torch_precision import float32_precision


@pytest.fixture(autouse=True)
def _settings():
    """Set all back to what torch starts with."""
    yield
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False


def by_precisions():
    torch.backends.fp32_precision = "tf32"


def by_precisions_of_each():
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def by_older_settings():
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


def by_one_word():
    torch.set_float32_matmul_precision("medium")


def effective() -> tuple[bool, bool]:
    """Whether convolutions, and products, may be rounded to TF32."""
    return (
        torch.backends.cudnn.conv.fp32_precision == "tf32",
        torch.backends.cuda.matmul.fp32_precision == "tf32",
    )


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize(
    "choose",
    [lambda: None, by_precisions, by_precisions_of_each, by_older_settings, by_one_word],
    ids=["nothing", "precisions", "precisions of each", "older settings", "one word"],
)
def test_a_precision_holds_meanwhile_and_the_one_before_afterwards(choose, tf32):
    choose()
    before = effective()
    with float32_precision(tf32=tf32):
        assert effective() == (tf32, tf32)
    assert effective() == before


def test_settings_that_follow_the_one_for_everything_still_do():
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.fp32_precision = "tf32"
    assert effective() == (True, True)
    with float32_precision(tf32=False):
        pass
    torch.backends.fp32_precision = "ieee"
    assert effective() == (False, False)


def test_what_one_word_has_set_can_still_be_read():
    torch.set_float32_matmul_precision("medium")
    with float32_precision(tf32=False):
        pass
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.allow_tf32


def test_algorithms_are_not_tried_out_meanwhile():
    torch.backends.cudnn.benchmark = True
    with float32_precision(tf32=False):
        assert not torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark
