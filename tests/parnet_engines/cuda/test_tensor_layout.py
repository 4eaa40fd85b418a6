import pytest

from parnet_engines.cuda.engine import DeviceTensor
from parnet_engines.cuda.tensor_layout import TensorLayout


@pytest.mark.parametrize(
    ("layout", "shape", "dtype", "size_bytes"),
    [
        (TensorLayout.LINEAR, (1, 92, 28, 28), "float32", 92 * 28 * 28 * 4),
        (TensorLayout.LINEAR, (5,), "float16", 10),
        (TensorLayout.HWC8, (1, 92, 28, 28), "float16", 96 * 28 * 28 * 2),
        (TensorLayout.HWC8, (2, 96, 7, 7), "float16", 2 * 96 * 49 * 2),
        (TensorLayout.CHW32, (1, 92, 14, 14), "float32", 96 * 14 * 14 * 4),
    ],
)
def test_vectors_pad_the_channels(layout, shape, dtype, size_bytes):
    assert layout.size_bytes(shape, dtype) == size_bytes
    assert DeviceTensor("t", dtype, shape, 4096, 0, layout).size_bytes == size_bytes


def test_a_tensor_without_channels_has_no_vectors_of_them():
    with pytest.raises(ValueError, match="rank 1 has no channels"):
        TensorLayout.HWC8.size_bytes((1000,), "float16")
