"""Rows as bytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.comm.rows import dequantise, pack, pack_rows, quantise, unpack, unpack_rows
from expertmesh.mesh.traffic import FORMATS, message_bytes, rows_bytes

widths = st.sampled_from([1, 2, 7, 127, 128, 129, 300])
names = st.sampled_from(sorted(FORMATS))
seeds = st.integers(0, 2**32)


@given(names, widths, st.integers(0, 9), seeds)
def test_a_message_is_read_as_it_was_packed(name: str, width: int, rows: int, seed: int) -> None:
    form, generator = FORMATS[name], torch.Generator().manual_seed(seed)
    data = quantise(torch.randn(rows, width, generator=generator), form)
    index = torch.randint(max(rows, 1), (rows * 2,), generator=generator)[: rows * 2 if rows else 0]
    counts = torch.randint(1, 5, (index.shape[0],), generator=generator)
    slots = torch.randint(1 << 20, (int(counts.sum()),), generator=generator)
    weights = torch.rand(slots.shape[0], generator=generator)
    buffer = np.zeros(message_bytes(index.shape[0], slots.shape[0], width, form), dtype=np.uint8)
    pack(buffer, data, *(t.numpy() for t in (index, counts, slots, weights)))
    message = unpack(buffer, width, form)
    for got, given_rows in zip(message.rows, data, strict=True):
        assert (got == given_rows[index]).all()
    assert (message.counts_R == counts.numpy()).all() and message.count == len(counts)
    assert (message.slots_E == slots.numpy()).all() and (message.weights_E == weights.numpy()).all()


@given(names, widths, st.integers(0, 9), seeds)
def test_rows_alone_are_read_as_they_were_packed(name: str, width: int, rows: int, seed: int) -> None:
    form = FORMATS[name]
    data = quantise(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), form)
    buffer = np.zeros(rows_bytes(rows, width, form), dtype=np.uint8)
    pack_rows(buffer, data)
    for got, given_rows in zip(unpack_rows(buffer, rows, width, form), data, strict=True):
        assert (got == given_rows).all()


@given(st.sampled_from(["int8", "fp8"]), widths, st.floats(1e-20, 1e20), seeds)
def test_quantising_loses_no_more_than_its_steps(name: str, width: int, size: float, seed: int) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(seed)) * size
    x[1] = 0
    back = dequantise(quantise(x, FORMATS[name]), FORMATS[name], torch.float32)
    most = torch.nn.functional.pad(x.abs(), (0, -width % 128)).unflatten(-1, (-1, 128)).amax(-1)
    bound = most.repeat_interleave(128, 1)[:, :width]
    # INT8: half a step of 1/127 of the block's largest. FP8: half a step of 3 bits of the number itself.
    step = bound / 254 if name == "int8" else torch.maximum(x.abs() / 16, bound / 448 / 512)
    assert ((back - x).abs() <= step * 1.001).all()
    assert not back[1].any()


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_plain_rows_are_the_rows(name: str) -> None:
    x = torch.randn(3, 5).to(getattr(torch, name))
    assert torch.equal(dequantise(quantise(x, FORMATS[name]), FORMATS[name], x.dtype), x)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_no_rows_have_bytes_that_torch_takes(name: str) -> None:
    for part in quantise(torch.empty(0, 130), FORMATS[name]):
        assert torch.from_numpy(part).view(-1).view(torch.uint8).shape == (0,)
        assert torch.from_numpy(part).stride(-1) == 1
