"""Remembered encodings are the encodings, bit for bit, and so are the losses that follow from them."""

import torch

from ouroboros3d.models.encoding_cache import EncodingCache


def counted(calls: list[int]):
    def encode(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        return images.mean((2, 3))

    return encode


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_what_is_known_is_not_encoded_again():
    cache, calls, images = EncodingCache(1e-3), [], pictures(4)
    first = cache("mean", images, counted(calls))
    again = cache("mean", images.flip(0), counted(calls))
    assert calls == [4] and torch.equal(again, first.flip(0))
    cache("other", images, counted(calls))
    cache("mean", torch.cat([images[:3], images[3:] + 1e-6]), counted(calls))
    assert calls == [4, 4, 4]  # one new picture: the whole batch


def test_pictures_that_differ_in_a_bit_or_in_order_are_told_apart():
    cache, calls, images = EncodingCache(1e-3), [], pictures(1)
    changed = images.clone()
    changed[0, 1, 2, 3] = torch.nextafter(changed[0, 1, 2, 3], torch.tensor(2.0))
    for one in (images, changed, images.flip(3), images.flip(1), images.transpose(2, 3), -images):
        cache("mean", one, counted(calls))
    assert calls == [1] * 6


def test_it_keeps_no_more_than_it_may():
    row = 3 * 4  # bytes
    cache, calls, images = EncodingCache(2.5 * row / 2**30), [], pictures(4)
    cache("mean", images, counted(calls))
    assert len(cache.rows) == 2
    cache("mean", images[:2], counted(calls))
    cache("mean", images[2:], counted(calls))
    assert calls == [4, 2]
    nothing = EncodingCache(0)
    nothing("mean", images, counted(calls))
    assert not nothing.rows
