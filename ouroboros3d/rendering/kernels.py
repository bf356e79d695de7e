"""The CPU renderer's kernels: projection, sorting, blending and their gradients, compiled by numba.

The stages of one call, for S = B x V views of N Gaussians each:

    project           every Gaussian into every view: a `SPLAT` with the box of pixels it can reach
    sort_and_count    per view: the drawn splats front to back, and how many meet each tile
    fill_tiles        per view: each tile's list of splats, front to back
    blend_forward     per (view, tile): the image, a block of pixels at a time (see simd.py)
    blend_backward    per (view, tile): back to front, the gradient of each (splat, tile) pair
    project_backward  per Gaussian: sums its pairs over tiles and views, then the chain rule of `project`

Every parallel loop writes to places of its own and sums in a fixed order: no atomics, no run differs.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numba
import numpy as np
from numba import prange

from ouroboros3d.rendering.simd import (
    BLOCK_HEIGHT,
    BLOCK_WIDTH,
    LANES,
    any_lane,
    exp,
    lane_sum,
    lane_x,
    lane_y,
    lanes,
    load,
    select,
    smaller,
    store,
)

TILE = 32  # pixels; the unit of work. The image does not depend on it
PIXELS = TILE * TILE
CHUNK = 512  # Gaussians per task of `project`

# A Gaussian seen from one view, lengths in pixels. Its alpha at offset d = mean - pixel centre is
# exp(log_opacity + xx dx^2 + xy dx dy + yy dy^2): with the opacity in the exponent, the test alpha >= 1/255
# is one comparison before the exponential.
SPLAT = np.dtype(
    [(name, np.float32) for name in ("x", "y", "xx", "xy", "yy", "log_opacity", "r", "g", "b", "depth")]
    + [(name, np.int32) for name in ("x0", "x1", "y0", "y1")]  # its box, x0 <= x < x1; empty if not drawn
    + [("first_pair", np.int64)]  # the number of its pair with the first tile it meets; the others follow
)

# A view: world-to-camera rotation (row by row) and translation, focal lengths and principal point in pixels.
CAMERA_NUMBERS = 16

# What blend_backward sums for a (splat, tile) pair, with v = dL/d(log alpha) of a pixel and w its weight:
# v, v dx, v dy, v dx^2, v dx dy, v dy^2, w dL/dr, w dL/dg, w dL/db, w dL/ddepth
PAIR_NUMBERS = 10

f32 = np.float32
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)
NEVER = f32(3e7)  # a list position no splat has; float32 holds list positions exactly up to 2^24

OPTIONS = dict(error_model="numpy", fastmath={"contract", "nsz", "arcp", "afn"})

# numba's cache notices changes of the compiled function's own file only. A folder named after the sources
# catches those of simd.py too.
SOURCES = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("kernels.py", "simd.py"))
CACHE = f"kernels-{hashlib.sha256(SOURCES).hexdigest()[:12]}"


def kernel(function):
    """A compiled function with parallel loops (prange), cached on disk: in NUMBA_CACHE_DIR, or else beside
    this file, or else where numba can write, or not at all."""
    users_choice = numba.config.CACHE_DIR
    try:
        numba.config.CACHE_DIR = str(Path(users_choice or Path(__file__).with_name("__pycache__")) / CACHE)
        return numba.njit(parallel=True, cache=True, **OPTIONS)(function)
    except RuntimeError:  # neither the checkout nor the home folder is writable
        return numba.njit(parallel=True, **OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = users_choice


helper = numba.njit(**OPTIONS)  # compiled into the kernels that call it


# ------------------------------------------------------------------------------------------------ projection


@helper
def dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@helper
def clamp(x, low, high):
    return min(max(x, low), high)


@helper
def times_covariance(cov, a):
    """Sigma a, for a symmetric 3 x 3 Sigma."""
    return (
        cov[0, 0] * a[0] + cov[0, 1] * a[1] + cov[0, 2] * a[2],
        cov[0, 1] * a[0] + cov[1, 1] * a[1] + cov[1, 2] * a[2],
        cov[0, 2] * a[0] + cov[1, 2] * a[1] + cov[2, 2] * a[2],
    )


@helper
def to_camera(mean, camera):
    """Camera coordinates x, y, z."""
    x = camera[0] * mean[0] + camera[1] * mean[1] + camera[2] * mean[2] + camera[9]
    y = camera[3] * mean[0] + camera[4] * mean[1] + camera[5] * mean[2] + camera[10]
    z = camera[6] * mean[0] + camera[7] * mean[1] + camera[8] * mean[2] + camera[11]
    return x, y, z


@helper
def clamped_slopes(x, y, z, camera, size, margin):
    """x / z and y / z where the Jacobian is taken: at most `margin` image widths outside the image."""
    fx, fy, cx, cy = camera[12], camera[13], camera[14], camera[15]
    border = margin * size
    u = clamp(x / z, -(cx + border) / fx, (size - cx + border) / fx)
    v = clamp(y / z, -(cy + border) / fy, (size - cy + border) / fy)
    return u, v


@helper
def jacobian_rows(u, v, z, camera):
    """The rows a, b of J W (Kerbl et al. 2023, eq. 5): how the pixel position moves with the world's."""
    fx, fy = camera[12] / z, camera[13] / z
    c0, c1, c2 = camera[6], camera[7], camera[8]
    a = (fx * (camera[0] - u * c0), fx * (camera[1] - u * c1), fx * (camera[2] - u * c2))
    b = (fy * (camera[3] - v * c0), fy * (camera[4] - v * c1), fy * (camera[5] - v * c2))
    return a, b


@helper
def to_pixel(x, size):
    """A whole number, however large, to a pixel border of the image."""
    return int(clamp(x, 0.0, size))


@helper
def extent(x, y, xx, xy, yy, opacity, size, rules):
    """The pixels that the rules let a splat touch and where alpha can reach min_alpha: x0, x1, y0, y1."""
    sigmas = math.sqrt(2 * math.log(opacity / rules.min_alpha))
    reach_x, reach_y = sigmas * math.sqrt(xx), sigmas * math.sqrt(yy)
    x0, x1 = to_pixel(np.ceil(x - reach_x - 0.5), size), to_pixel(np.floor(x + reach_x + 0.5), size)
    y0, y1 = to_pixel(np.ceil(y - reach_y - 0.5), size), to_pixel(np.floor(y + reach_y + 0.5), size)
    tile, last = float(rules.tile), float(rules.tile - 1)
    if rules.square_sigmas > 0:
        middle = 0.5 * (xx + yy)
        longer = middle + math.sqrt(max(0.1, middle * middle - (xx * yy - xy * xy)))
        radius = np.ceil(rules.square_sigmas * math.sqrt(longer))
        px, py = x - 0.5, y - 0.5  # that kernel's pixel centres are integers
        left, right = np.floor((px - radius) / tile), np.floor((px + radius + last) / tile)
        top, bottom = np.floor((py - radius) / tile), np.floor((py + radius + last) / tile)
    elif rules.axis_sigmas > 0:
        sigmas = min(rules.axis_sigmas, sigmas)
        reach_x, reach_y = np.ceil(sigmas * math.sqrt(xx)), np.ceil(sigmas * math.sqrt(yy))
        left, right = np.floor((x - reach_x) / tile), np.ceil((x + reach_x) / tile)
        top, bottom = np.floor((y - reach_y) / tile), np.ceil((y + reach_y) / tile)
    else:
        return x0, x1, y0, y1
    x0, x1 = max(x0, to_pixel(left * tile, size)), min(x1, to_pixel(right * tile, size))
    y0, y1 = max(y0, to_pixel(top * tile, size)), min(y1, to_pixel(bottom * tile, size))
    return x0, x1, y0, y1


@kernel
def project(means, covariances, opacities, rgb, cameras, views, size, rules, near, far, splats):
    """means [B, N, 3], covariances [B, N, 3, 3], opacities [B, N], rgb [B, N, 3], cameras [S, 16] float64 ->
    splats [S, N]. In float64, for the sake of the determinant of long thin splats."""
    batch, count = opacities.shape
    chunks = (count + CHUNK - 1) // CHUNK
    for job in prange(batch * chunks):
        scene, start = job // chunks, job % chunks * CHUNK
        for i in range(start, min(start + CHUNK, count)):
            opacity = float(opacities[scene, i])
            cov = covariances[scene, i]
            for view in range(scene * views, (scene + 1) * views):
                splat, camera = splats[view, i], cameras[view]
                splat.x0 = splat.x1 = splat.y0 = splat.y1 = 0
                x, y, z = to_camera(means[scene, i], camera)
                if not (near < z < far and opacity > rules.min_alpha):
                    continue
                u, v = clamped_slopes(x, y, z, camera, size, rules.clamp_margin)
                a, b = jacobian_rows(u, v, z, camera)
                cov_b = times_covariance(cov, b)
                xx = dot(a, times_covariance(cov, a)) + rules.blur
                xy = dot(a, cov_b)
                yy = dot(b, cov_b) + rules.blur
                det = xx * yy - xy * xy
                if not (0 < det < math.inf):  # overflow, or not positive definite
                    continue
                image_x, image_y = camera[12] * x / z + camera[14], camera[13] * y / z + camera[15]
                splat.x, splat.y, splat.depth = image_x, image_y, z
                splat.xx, splat.xy, splat.yy = -0.5 * yy / det, xy / det, -0.5 * xx / det
                splat.log_opacity = math.log(opacity)
                splat.r, splat.g, splat.b = rgb[scene, i, 0], rgb[scene, i, 1], rgb[scene, i, 2]
                x0, x1, y0, y1 = extent(image_x, image_y, xx, xy, yy, opacity, size, rules)
                if x0 < x1 and y0 < y1:
                    splat.x0, splat.x1, splat.y0, splat.y1 = x0, x1, y0, y1


@kernel
def project_backward(
    means, covariances, opacities, cameras, views, size, rules, splats, pairs,
    d_means, d_covariances, d_opacities, d_rgb,
):  # fmt: skip
    """From the gradients of the pairs [P, 10] to those of `project`'s inputs, d_* in their shapes."""
    batch, count = opacities.shape
    chunks = (count + CHUNK - 1) // CHUNK
    for job in prange(batch * chunks):
        scene, start = job // chunks, job % chunks * CHUNK
        s = np.empty(PAIR_NUMBERS, np.float64)
        for i in range(start, min(start + CHUNK, count)):
            cov = covariances[scene, i]
            gx = gy = gz = g_opacity = g_r = g_g = g_b = 0.0
            c00 = c01 = c02 = c11 = c12 = c22 = 0.0
            for view in range(scene * views, (scene + 1) * views):
                splat, camera = splats[view, i], cameras[view]
                tx0, tx1, ty0, ty1 = tile_range(splat)
                if tx0 == tx1:
                    continue
                s[:] = 0.0
                for pair in range(splat.first_pair, splat.first_pair + (tx1 - tx0) * (ty1 - ty0)):
                    for c in range(PAIR_NUMBERS):
                        s[c] += pairs[pair, c]
                g_opacity += s[0]
                g_r += s[6]
                g_g += s[7]
                g_b += s[8]

                x, y, z = to_camera(means[scene, i], camera)
                u, v = clamped_slopes(x, y, z, camera, size, rules.clamp_margin)
                a, b = jacobian_rows(u, v, z, camera)
                cov_a, cov_b = times_covariance(cov, a), times_covariance(cov, b)
                xx = dot(a, cov_a) + rules.blur
                xy = dot(a, cov_b)
                yy = dot(b, cov_b) + rules.blur
                det = xx * yy - xy * xy
                q00, q01, q11 = yy / det, -xy / det, xx / det  # the conic Q

                # log alpha = log opacity - d^T Q d / 2 with d = mean - pixel
                g_image_x = -(q00 * s[1] + q01 * s[2])
                g_image_y = -(q01 * s[1] + q11 * s[2])
                # dL/dSigma' = -Q G Q with G = dL/dQ = -1/2 [[s3, s4], [s4, s5]]
                m00, m01 = q00 * s[3] + q01 * s[4], q00 * s[4] + q01 * s[5]
                m10, m11 = q01 * s[3] + q11 * s[4], q01 * s[4] + q11 * s[5]
                g_xx = 0.5 * (m00 * q00 + m01 * q01)
                g_xy = 0.5 * (m00 * q01 + m01 * q11)
                g_yy = 0.5 * (m10 * q01 + m11 * q11)
                # Sigma' = (a, b)^T Sigma (a, b): to Sigma ...
                c00 += g_xx * a[0] * a[0] + 2 * g_xy * a[0] * b[0] + g_yy * b[0] * b[0]
                c11 += g_xx * a[1] * a[1] + 2 * g_xy * a[1] * b[1] + g_yy * b[1] * b[1]
                c22 += g_xx * a[2] * a[2] + 2 * g_xy * a[2] * b[2] + g_yy * b[2] * b[2]
                c01 += g_xx * a[0] * a[1] + g_xy * (a[0] * b[1] + a[1] * b[0]) + g_yy * b[0] * b[1]
                c02 += g_xx * a[0] * a[2] + g_xy * (a[0] * b[2] + a[2] * b[0]) + g_yy * b[0] * b[2]
                c12 += g_xx * a[1] * a[2] + g_xy * (a[1] * b[2] + a[2] * b[1]) + g_yy * b[1] * b[2]
                # ... and to a and b, which depend on z, u and v
                along_z = (camera[6], camera[7], camera[8])
                g_u = -2 * camera[12] / z * (g_xx * dot(cov_a, along_z) + g_xy * dot(cov_b, along_z))
                g_v = -2 * camera[13] / z * (g_xy * dot(cov_a, along_z) + g_yy * dot(cov_b, along_z))
                g_z = s[9] - 2 / z * (g_xx * (xx - rules.blur) + 2 * g_xy * xy + g_yy * (yy - rules.blur))
                # image_x = fx x / z + cx, u = x / z unless it is clamped
                g_slope_x = camera[12] * g_image_x + (g_u if u == x / z else 0.0)
                g_slope_y = camera[13] * g_image_y + (g_v if v == y / z else 0.0)
                g_x, g_y = g_slope_x / z, g_slope_y / z
                g_z -= (g_x * x + g_y * y) / z
                gx += camera[0] * g_x + camera[3] * g_y + camera[6] * g_z
                gy += camera[1] * g_x + camera[4] * g_y + camera[7] * g_z
                gz += camera[2] * g_x + camera[5] * g_y + camera[8] * g_z
            d_means[scene, i, 0], d_means[scene, i, 1], d_means[scene, i, 2] = gx, gy, gz
            d_rgb[scene, i, 0], d_rgb[scene, i, 1], d_rgb[scene, i, 2] = g_r, g_g, g_b
            d_opacities[scene, i] = g_opacity / opacities[scene, i] if g_opacity != 0 else 0.0
            d_cov = d_covariances[scene, i]
            d_cov[0, 0], d_cov[1, 1], d_cov[2, 2] = c00, c11, c22
            d_cov[0, 1] = d_cov[1, 0] = c01
            d_cov[0, 2] = d_cov[2, 0] = c02
            d_cov[1, 2] = d_cov[2, 1] = c12


# ----------------------------------------------------------------------------------------- sorting and tiling


@helper
def tile_range(splat):
    """Tiles [tx0, tx1) x [ty0, ty1) that the splat's box meets."""
    return splat.x0 // TILE, (splat.x1 + TILE - 1) // TILE, splat.y0 // TILE, (splat.y1 + TILE - 1) // TILE


@helper
def sort_by_depth(keys, order):
    """Stable radix sort of `order` by `keys`, the bits of positive floats, which order like the floats."""
    other_keys, other_order = np.empty_like(keys), np.empty_like(order)
    for shift in (0, 8, 16, 24):  # after an even number of passes the result is back in `order`
        position = np.zeros(257, np.int64)
        for key in keys:
            position[((key >> np.uint32(shift)) & np.uint32(255)) + 1] += 1
        for digit in range(256):
            position[digit + 1] += position[digit]
        for j in range(len(keys)):
            digit = (keys[j] >> np.uint32(shift)) & np.uint32(255)
            other_keys[position[digit]], other_order[position[digit]] = keys[j], order[j]
            position[digit] += 1
        keys, other_keys = other_keys, keys
        order, other_order = other_order, order


@kernel
def sort_and_count(splats, tiles, order, drawn, ranges, counts):
    """drawn [S]: how many splats are drawn; order [S, N]: which, front to back; ranges [S, N, 4]: their
    tiles; counts [S, tiles^2]: splats per tile."""
    for view in prange(len(splats)):
        keys = np.empty(splats.shape[1], np.uint32)
        n = 0
        for i in range(splats.shape[1]):
            tx0, tx1, ty0, ty1 = tile_range(splats[view, i])
            if tx0 == tx1:
                continue
            ranges[view, i, 0], ranges[view, i, 1] = tx0, tx1
            ranges[view, i, 2], ranges[view, i, 3] = ty0, ty1
            keys[n] = f32(splats[view, i].depth).view(np.uint32)
            order[view, n] = i
            n += 1
            for ty in range(ty0, ty1):
                for tx in range(tx0, tx1):
                    counts[view, ty * tiles + tx] += 1
        sort_by_depth(keys[:n], order[view, :n])
        drawn[view] = n


@kernel
def fill_tiles(splats, tiles, order, drawn, ranges, starts, lists):
    """The tiles' lists of splats, front to back, one after another from starts[view, tile]; and numbers the
    (splat, tile) pairs, those of a splat in a row, so that `project_backward` reads them in a row."""
    for view in prange(len(splats)):
        cursor = starts[view].copy()
        pair = cursor[0]
        for i in range(splats.shape[1]):
            tx0, tx1, ty0, ty1 = tile_range(splats[view, i])
            splats[view, i].first_pair = pair
            pair += (tx1 - tx0) * (ty1 - ty0)
        for i in order[view, : drawn[view]]:
            for ty in range(ranges[view, i, 2], ranges[view, i, 3]):
                for tx in range(ranges[view, i, 0], ranges[view, i, 1]):
                    tile = ty * tiles + tx
                    lists[cursor[tile]] = i
                    cursor[tile] += 1


# --------------------------------------------------------------------------------------------------- blending
# A tile's state is a flat array of planes of PIXELS floats, a plane being its blocks one after another,
# column by column of blocks; a block is LANES pixels.

BLOCK_ROWS = TILE // BLOCK_HEIGHT


@helper
def pixel_index(x, y):
    """Where pixel (x, y) of a tile is in a plane."""
    block = (x // BLOCK_WIDTH) * BLOCK_ROWS + y // BLOCK_HEIGHT
    return block * LANES + (y % BLOCK_HEIGHT) * BLOCK_WIDTH + x % BLOCK_WIDTH


@helper
def block_range(splat, left, top):
    """Blocks [bx0, bx1) x [by0, by1) of the tile at (left, top) that the splat's box meets."""
    return (
        max(splat.x0 - left, 0) // BLOCK_WIDTH,
        (min(splat.x1 - left, TILE) + BLOCK_WIDTH - 1) // BLOCK_WIDTH,
        max(splat.y0 - top, 0) // BLOCK_HEIGHT,
        (min(splat.y1 - top, TILE) + BLOCK_HEIGHT - 1) // BLOCK_HEIGHT,
    )


# planes of blend_forward
T, T_FINAL, LAST, RED, GREEN, BLUE, DEPTH = (PIXELS * i for i in range(7))


@kernel
def blend_forward(splats, lists, starts, ends, size, background, rules, rgb, depths, alphas, transmittance, last):
    """rgb [S, 3, H, W] on the background, depths and alphas [S, H, W]; and for the way back, [S, H, W], the
    final transmittance and the position in the tile's list after which nothing was blended, -1 if nothing was."""
    views, tile_count = starts.shape
    tiles = (size + TILE - 1) // TILE
    min_power, max_alpha = f32(math.log(rules.min_alpha)), f32(rules.max_alpha)
    min_transmittance = f32(rules.min_transmittance)
    for job in prange(views * tile_count):
        view, tile = job // tile_count, job % tile_count
        left, top = tile % tiles * TILE, tile // tiles * TILE
        width, height = min(TILE, size - left), min(TILE, size - top)
        state = np.zeros(7 * PIXELS, np.float32)
        for y in range(height):
            for x in range(width):
                state[T + pixel_index(x, y)] = ONE  # 0 once a pixel is done, as it is outside the image
        state[LAST : LAST + PIXELS] = NEVER
        start, end = starts[view, tile], ends[view, tile]
        for k in range(start, end):
            splat = splats[view, lists[k]]
            bx0, bx1, by0, by1 = block_range(splat, left, top)
            r, g, b, depth = lanes(splat.r), lanes(splat.g), lanes(splat.b), lanes(splat.depth)
            previous = lanes(f32(k - start - 1))
            for bx in range(bx0, bx1):
                dx = lanes(splat.x - f32(left + BLOCK_WIDTH * bx) - HALF) - lane_x()
                power_x, slope = dx * dx * splat.xx + splat.log_opacity, dx * splat.xy
                for by in range(by0, by1):
                    dy = lanes(splat.y - f32(top + BLOCK_HEIGHT * by) - HALF) - lane_y()
                    power = power_x + dy * (slope + dy * splat.yy)
                    u = (bx * BLOCK_ROWS + by) * LANES
                    before = load(state, T + u)
                    touched = (power >= lanes(min_power)) & (before > lanes(ZERO))
                    if any_lane(touched):
                        alpha = select(touched, smaller(exp(power), lanes(max_alpha)), lanes(ZERO))
                        weight = alpha * before
                        after = before - weight
                        done = (after < lanes(min_transmittance)) & (before > lanes(ZERO))
                        if any_lane(done):
                            store(state, T_FINAL + u, select(done, before, load(state, T_FINAL + u)))
                            store(state, LAST + u, select(done, previous, load(state, LAST + u)))
                            weight = select(done, lanes(ZERO), weight)
                            after = select(done, lanes(ZERO), after)
                        store(state, T + u, after)
                        store(state, RED + u, load(state, RED + u) + weight * r)
                        store(state, GREEN + u, load(state, GREEN + u) + weight * g)
                        store(state, BLUE + u, load(state, BLUE + u) + weight * b)
                        store(state, DEPTH + u, load(state, DEPTH + u) + weight * depth)
            if (k - start) % 32 == 31:
                remaining = load(state, T)
                for u in range(LANES, PIXELS, LANES):
                    remaining = remaining + load(state, T + u)
                if lane_sum(remaining) == ZERO:
                    break
        for y in range(height):
            for x in range(width):
                u = pixel_index(x, y)
                final = state[T + u] + state[T_FINAL + u]  # one of them is zero
                rgb[view, 0, top + y, left + x] = state[RED + u] + final * background[0]
                rgb[view, 1, top + y, left + x] = state[GREEN + u] + final * background[1]
                rgb[view, 2, top + y, left + x] = state[BLUE + u] + final * background[2]
                depths[view, top + y, left + x] = state[DEPTH + u]
                alphas[view, top + y, left + x] = ONE - final
                transmittance[view, top + y, left + x] = final
                last[view, top + y, left + x] = min(int(state[LAST + u]), end - start - 1)


@helper
def pair_number(splat, tile, tiles):
    """The row of a splat and a tile in the gradients of the pairs."""
    tx0, tx1, ty0, _ = tile_range(splat)
    return splat.first_pair + (tile // tiles - ty0) * (tx1 - tx0) + (tile % tiles - tx0)


# planes of blend_backward: the image's gradients, the sum R of what lies behind the splat, and the above
G_RED, G_GREEN, G_BLUE, G_DEPTH, G_ALPHA, BEHIND, T_NOW, LAST_NOW = (PIXELS * i for i in range(8))


@kernel
def blend_backward(
    splats, lists, starts, ends, size, background, rules, transmittance, last, d_rgb, d_depths, d_alphas,
    pairs
):  # fmt: skip
    """The gradient of every (splat, tile) pair, pairs [P, 10].

    A pixel's loss gradient makes the scalar s_i = dL/drgb . rgb_i + dL/ddepth z_i + dL/dalpha of each splat,
    and dL/dalpha_i = T_i s_i - R_i / (1 - alpha_i), R_i being the sum of alpha_j T_j s_j over the splats j
    behind. Walking back to front, T_i follows from the final transmittance by division, R_i is a running sum.
    """
    views, tile_count = starts.shape
    tiles = (size + TILE - 1) // TILE
    min_power, max_alpha = f32(math.log(rules.min_alpha)), f32(rules.max_alpha)
    for job in prange(views * tile_count):
        view, tile = job // tile_count, job % tile_count
        left, top = tile % tiles * TILE, tile // tiles * TILE
        state = np.zeros(8 * PIXELS, np.float32)
        state[LAST_NOW : LAST_NOW + PIXELS] = -ONE
        deepest = -1
        for y in range(min(TILE, size - top)):
            for x in range(min(TILE, size - left)):
                u = pixel_index(x, y)
                r = d_rgb[view, 0, top + y, left + x]
                g = d_rgb[view, 1, top + y, left + x]
                b = d_rgb[view, 2, top + y, left + x]
                state[G_RED + u], state[G_GREEN + u], state[G_BLUE + u] = r, g, b
                state[G_DEPTH + u] = d_depths[view, top + y, left + x]
                hidden = r * background[0] + g * background[1] + b * background[2]
                state[G_ALPHA + u] = d_alphas[view, top + y, left + x] - hidden
                state[T_NOW + u] = transmittance[view, top + y, left + x]
                state[LAST_NOW + u] = f32(last[view, top + y, left + x])
                deepest = max(deepest, last[view, top + y, left + x])
        start = starts[view, tile]
        for k in range(start + deepest + 1, ends[view, tile]):
            pairs[pair_number(splats[view, lists[k]], tile, tiles)] = ZERO
        for position in range(deepest, -1, -1):
            splat = splats[view, lists[start + position]]
            bx0, bx1, by0, by1 = block_range(splat, left, top)
            r, g, b, depth = lanes(splat.r), lanes(splat.g), lanes(splat.b), lanes(splat.depth)
            zero, here = lanes(ZERO), lanes(f32(position))
            sum_v = sum_vx = sum_vy = sum_vxx = sum_vxy = sum_vyy = zero
            sum_r = sum_g = sum_b = sum_depth = zero
            for bx in range(bx0, bx1):
                dx = lanes(splat.x - f32(left + BLOCK_WIDTH * bx) - HALF) - lane_x()
                power_x, slope = dx * dx * splat.xx + splat.log_opacity, dx * splat.xy
                column_v = column_vy = column_vyy = zero
                for by in range(by0, by1):
                    dy = lanes(splat.y - f32(top + BLOCK_HEIGHT * by) - HALF) - lane_y()
                    power = power_x + dy * (slope + dy * splat.yy)
                    u = (bx * BLOCK_ROWS + by) * LANES
                    touched = (power >= lanes(min_power)) & (here <= load(state, LAST_NOW + u))
                    if any_lane(touched):
                        unclamped = exp(power)
                        alpha = select(touched, smaller(unclamped, lanes(max_alpha)), zero)
                        inverse = lanes(ONE) / (lanes(ONE) - alpha)
                        before = load(state, T_NOW + u) * inverse
                        store(state, T_NOW + u, before)
                        weight = alpha * before
                        g_r, g_g = load(state, G_RED + u), load(state, G_GREEN + u)
                        g_b, g_depth = load(state, G_BLUE + u), load(state, G_DEPTH + u)
                        s = g_r * r + g_g * g + (g_b * b + (g_depth * depth + load(state, G_ALPHA + u)))
                        behind = load(state, BEHIND + u)
                        store(state, BEHIND + u, behind + weight * s)
                        v = weight * s - alpha * (behind * inverse)  # alpha dL/dalpha
                        v = select(unclamped <= lanes(max_alpha), v, zero)
                        column_v = column_v + v
                        column_vy = column_vy + v * dy
                        column_vyy = column_vyy + v * dy * dy
                        sum_r = sum_r + weight * g_r
                        sum_g = sum_g + weight * g_g
                        sum_b = sum_b + weight * g_b
                        sum_depth = sum_depth + weight * g_depth
                sum_v, sum_vy, sum_vyy = sum_v + column_v, sum_vy + column_vy, sum_vyy + column_vyy
                sum_vx = sum_vx + column_v * dx
                sum_vxx = sum_vxx + column_v * dx * dx
                sum_vxy = sum_vxy + column_vy * dx
            pair = pairs[pair_number(splat, tile, tiles)]
            pair[0], pair[1], pair[2] = lane_sum(sum_v), lane_sum(sum_vx), lane_sum(sum_vy)
            pair[3], pair[4], pair[5] = lane_sum(sum_vxx), lane_sum(sum_vxy), lane_sum(sum_vyy)
            pair[6], pair[7], pair[8] = lane_sum(sum_r), lane_sum(sum_g), lane_sum(sum_b)
            pair[9] = lane_sum(sum_depth)
