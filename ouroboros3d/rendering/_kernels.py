"""Blending kernels of the CPU renderer: plain loops over tiles, compiled by numba."""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

TILE = 16
f32 = np.float32


@njit(cache=True)
def fill_tiles(order, boxes, tiles, counts_only, counts, cursor, lists, pairs):
    """Counts, or lists by depth, the Gaussians of each tile of one view; `pairs` numbers (Gaussian, tile)."""
    pair = 0
    for i in order:
        x0, x1, y0, y1 = boxes[i]
        if x0 >= x1 or y0 >= y1:
            continue
        for ty in range(y0 // TILE, (y1 - 1) // TILE + 1):
            for tx in range(x0 // TILE, (x1 - 1) // TILE + 1):
                t = ty * tiles + tx
                if counts_only:
                    counts[t] += 1
                else:
                    lists[cursor[t]] = i
                    cursor[t] += 1


@njit(parallel=True, cache=True, error_model="numpy")
def blend_forward(means, conics, features, opacities, boxes, lists, starts, size, limits, out, last):
    views, tile_count = starts.shape[0], starts.shape[1] - 1
    tiles = (size + TILE - 1) // TILE
    max_alpha, min_alpha, min_t = limits
    for job in prange(views * tile_count):
        v, t = job // tile_count, job % tile_count
        tx, ty = t % tiles * TILE, t // tiles * TILE
        for y in range(ty, min(ty + TILE, size)):
            for x in range(tx, min(tx + TILE, size)):
                transmittance = f32(1)
                r = g = b = d = f32(0)
                final = -1
                for k in range(starts[v, t], starts[v, t + 1]):
                    i = lists[k]
                    if x < boxes[v, i, 0] or x >= boxes[v, i, 1] or y < boxes[v, i, 2] or y >= boxes[v, i, 3]:
                        continue
                    dx = f32(x) + f32(0.5) - means[v, i, 0]
                    dy = f32(y) + f32(0.5) - means[v, i, 1]
                    power = (
                        f32(-0.5) * (conics[v, i, 0] * dx * dx + conics[v, i, 2] * dy * dy) - conics[v, i, 1] * dx * dy
                    )
                    alpha = min(max_alpha, opacities[v, i] * math.exp(power))
                    if power > 0 or alpha < min_alpha:
                        continue
                    after = transmittance * (f32(1) - alpha)
                    if after < min_t:
                        break
                    w = alpha * transmittance
                    r += w * features[v, i, 0]
                    g += w * features[v, i, 1]
                    b += w * features[v, i, 2]
                    d += w * features[v, i, 3]
                    transmittance = after
                    final = k
                out[v, y, x, 0] = r
                out[v, y, x, 1] = g
                out[v, y, x, 2] = b
                out[v, y, x, 3] = d
                out[v, y, x, 4] = f32(1) - transmittance
                last[v, y, x] = final


@njit(parallel=True, cache=True, error_model="numpy")
def blend_backward(
    means, conics, features, opacities, boxes, lists, starts, size, limits, out, last, grad, pair_grad
):
    """Gradient of each (Gaussian, tile) pair: mean 2, conic 3, features 4, opacity 1."""
    views, tile_count = starts.shape[0], starts.shape[1] - 1
    tiles = (size + TILE - 1) // TILE
    max_alpha, min_alpha, min_t = limits
    for job in prange(views * tile_count):
        v, t = job // tile_count, job % tile_count
        tx, ty = t % tiles * TILE, t // tiles * TILE
        for y in range(ty, min(ty + TILE, size)):
            for x in range(tx, min(tx + TILE, size)):
                transmittance = f32(1) - out[v, y, x, 4]
                behind = f32(0)
                gr, gg, gb, gd, ga = grad[v, y, x]
                for k in range(last[v, y, x], starts[v, t] - 1, -1):
                    i = lists[k]
                    if x < boxes[v, i, 0] or x >= boxes[v, i, 1] or y < boxes[v, i, 2] or y >= boxes[v, i, 3]:
                        continue
                    dx = f32(x) + f32(0.5) - means[v, i, 0]
                    dy = f32(y) + f32(0.5) - means[v, i, 1]
                    power = (
                        f32(-0.5) * (conics[v, i, 0] * dx * dx + conics[v, i, 2] * dy * dy) - conics[v, i, 1] * dx * dy
                    )
                    gauss = math.exp(power)
                    raw = opacities[v, i] * gauss
                    alpha = min(max_alpha, raw)
                    if power > 0 or alpha < min_alpha:
                        continue
                    transmittance /= f32(1) - alpha
                    w = alpha * transmittance
                    s = gr * features[v, i, 0] + gg * features[v, i, 1] + gb * features[v, i, 2]
                    s += gd * features[v, i, 3] + ga
                    out_k = pair_grad[k]
                    out_k[5] += w * gr
                    out_k[6] += w * gg
                    out_k[7] += w * gb
                    out_k[8] += w * gd
                    if raw <= max_alpha:
                        d_alpha = transmittance * s - behind / (f32(1) - alpha)
                        d_power = d_alpha * alpha
                        out_k[0] += d_power * (conics[v, i, 0] * dx + conics[v, i, 1] * dy)
                        out_k[1] += d_power * (conics[v, i, 2] * dy + conics[v, i, 1] * dx)
                        out_k[2] += f32(-0.5) * d_power * dx * dx
                        out_k[3] -= d_power * dx * dy
                        out_k[4] += f32(-0.5) * d_power * dy * dy
                        out_k[9] += d_alpha * gauss
                    behind += w * s


@njit(parallel=True, cache=True)
def reduce_pairs(pair_grad, lists, starts, total):
    """Sums the gradients of the pairs to `total` [views, N, 10], views in parallel, always in the same order."""
    for v in prange(starts.shape[0]):
        for k in range(starts[v, 0], starts[v, -1]):
            for c in range(10):
                total[v, lists[k], c] += pair_grad[k, c]
