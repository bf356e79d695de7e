// Draws packed 3D Gaussians with WebGL2: the equations of ouroboros3d/rendering (rules "exact"), back to front.
// Packing, one RGBA32UI texel per Gaussian (ouroboros3d/export/packing.py):
//   x: position x, y (u16 each)   y: position z (u16), log scale 0, 1 (u8 each)
//   z: log scale 2, quaternion x, y, z (u8 each)   w: red, green, blue, opacity (u8 each)

const TEXELS = 1024; // per row of the texture
const AXIS = 0.53; // greatest x, y, z of the quaternions
const KEYS = 65536; // depth levels of the sort

const VERTEX = `#version 300 es
precision highp float; precision highp int; precision highp usampler2D;
uniform usampler2D gaussians;
uniform vec3 low, extent;     // box of the positions
uniform vec2 scales;          // least log scale, range
uniform mat3 toCamera;        // OpenCV axes: x right, y down, z forward
uniform vec3 eye;
uniform float focal, size, near; // pixels, pixels, world units
in vec2 corner;
in uint index;
flat out vec4 colour;
flat out vec3 conic;
out vec2 offset;

vec3 bytes(uint a, uint b, uint c) { return vec3(a & 255u, b & 255u, c & 255u); }

mat3 rotation(vec4 q) { // (x, y, z, w)
  float x = q.x, y = q.y, z = q.z, w = q.w;
  return mat3(1. - 2. * (y * y + z * z), 2. * (x * y + w * z), 2. * (x * z - w * y),
              2. * (x * y - w * z), 1. - 2. * (x * x + z * z), 2. * (y * z + w * x),
              2. * (x * z + w * y), 2. * (y * z - w * x), 1. - 2. * (x * x + y * y));
}

void main() {
  uvec4 t = texelFetch(gaussians, ivec2(int(index) & ${TEXELS - 1}, int(index) / ${TEXELS}), 0);
  vec3 mean = low + extent * vec3(t.x & 65535u, t.x >> 16, t.y & 65535u) / 65535.;
  vec3 scale = exp(scales.x + scales.y * bytes(t.y >> 16, t.y >> 24, t.z) / 255.);
  vec3 axis = ${AXIS} * (bytes(t.z >> 8, t.z >> 16, t.z >> 24) / 127.5 - 1.);
  colour = vec4(bytes(t.w, t.w >> 8, t.w >> 16), float(t.w >> 24)) / 255.;
  vec3 p = toCamera * (mean - eye);
  gl_Position = vec4(0., 0., 2., 1.); // outside: not drawn
  if (p.z <= near) return;
  // Sigma' = J W Sigma W^T J^T + 0.3 I (Kerbl et al. 2023, eq. 5); J is clamped 15 % outside the picture.
  mat3 half_ = toCamera * rotation(vec4(axis, sqrt(1. - dot(axis, axis))));
  half_ = mat3(half_[0] * scale.x, half_[1] * scale.y, half_[2] * scale.z);
  float bound = .65 * size / focal;
  vec2 uv = clamp(p.xy / p.z, -bound, bound);
  vec3 jx = focal / p.z * vec3(1., 0., -uv.x), jy = focal / p.z * vec3(0., 1., -uv.y);
  vec3 a = jx * half_, b = jy * half_;
  float xx = dot(a, a) + .3, xy = dot(a, b), yy = dot(b, b) + .3, det = xx * yy - xy * xy;
  if (!(det > 0.) || colour.a * 255. <= 1.) return;
  conic = vec3(yy, -xy, xx) / det;
  offset = corner * sqrt(2. * log(colour.a * 255.) * vec2(xx, yy)); // where alpha falls to 1/255
  vec2 place = (focal * p.xy / p.z + offset) / (.5 * size);
  gl_Position = vec4(place.x, -place.y, 0., 1.);
}`;

const FRAGMENT = `#version 300 es
precision highp float;
flat in vec4 colour;
flat in vec3 conic;
in vec2 offset;
out vec4 result;
void main() {
  vec3 d = vec3(offset.x * offset.x, 2. * offset.x * offset.y, offset.y * offset.y);
  float alpha = min(.99, colour.a * exp(-.5 * dot(conic, d)));
  if (alpha < 1. / 255.) discard;
  result = vec4(colour.rgb * alpha, alpha);
}`;

class SplatRenderer {
  // Throws where the browser has no WebGL2.
  constructor(canvas) {
    const options = { antialias: false, alpha: false, powerPreference: "high-performance" };
    this.canvas = canvas;
    this.gl = canvas.getContext("webgl2", options);
    if (!this.gl) throw new Error("no WebGL2");
    this.setUp();
    canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
    canvas.addEventListener("webglcontextrestored", () => {
      this.setUp();
      if (this.packed) this.load(this.packed);
      canvas.dispatchEvent(new Event("redraw"));
    });
  }

  setUp() {
    const gl = this.gl;
    this.halfSize = this.halfPixels = null;
    const program = gl.createProgram();
    for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, text);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.bindAttribLocation(program, 0, "corner");
    gl.bindAttribLocation(program, 1, "index");
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost())
      throw new Error(`the shaders do not link: ${gl.getProgramInfoLog(program)}`);
    gl.useProgram(program);
    const names = ["low", "extent", "scales", "toCamera", "eye", "focal", "size", "near"];
    this.uniforms = Object.fromEntries(names.map((name) => [name, gl.getUniformLocation(program, name)]));
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer()); // the order; stays bound
    gl.enableVertexAttribArray(1);
    gl.vertexAttribIPointer(1, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(1, 1);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER])
      gl.texParameteri(gl.TEXTURE_2D, filter, gl.NEAREST);
    this.half = gl.getExtension("EXT_color_buffer_float") && gl.createFramebuffer();
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.disable(gl.DEPTH_TEST);
  }

  // Blending in 8 bits would round once per Gaussian: draw into half floats where the browser can, then copy.
  bindTarget() {
    const { gl, half, canvas } = this;
    if (!half) return;
    gl.bindFramebuffer(gl.FRAMEBUFFER, half);
    if (this.halfSize === canvas.width) return;
    gl.deleteRenderbuffer(this.halfPixels);
    this.halfPixels = gl.createRenderbuffer();
    this.halfSize = canvas.width;
    gl.bindRenderbuffer(gl.RENDERBUFFER, this.halfPixels);
    gl.renderbufferStorage(gl.RENDERBUFFER, gl.RGBA16F, canvas.width, canvas.height);
    gl.framebufferRenderbuffer(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.RENDERBUFFER, this.halfPixels);
  }

  copyTarget() {
    const { gl, half } = this;
    const { width, height } = this.canvas;
    if (!half) return;
    gl.bindFramebuffer(gl.DRAW_FRAMEBUFFER, null);
    gl.blitFramebuffer(0, 0, width, height, 0, 0, width, height, gl.COLOR_BUFFER_BIT, gl.NEAREST);
  }

  // packed: { words: Uint32Array of 4 per Gaussian, low, extent, scales }
  load(packed) {
    const gl = this.gl;
    this.packed = packed;
    this.count = packed.words.length / 4;
    const rows = Math.max(1, Math.ceil(this.count / TEXELS));
    const texels = new Uint32Array(rows * TEXELS * 4);
    texels.set(packed.words);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32UI, TEXELS, rows, 0, gl.RGBA_INTEGER, gl.UNSIGNED_INT, texels);
    this.keys = new Uint16Array(this.count);
    this.depths = new Float32Array(this.count);
    this.order = new Uint32Array(this.count);
    this.sorted = null;
  }

  // Far first, by a counting sort of the depth along `forward` in 65,536 levels.
  sort(forward) {
    const { count, keys, depths, order } = this;
    const { words, extent } = this.packed;
    const [x, y, z] = forward.map((f, i) => (f * extent[i]) / 65535);
    let least = Infinity;
    let most = -Infinity;
    for (let i = 0; i < count; i++) {
      const xy = words[4 * i];
      const depth = x * (xy & 65535) + y * (xy >>> 16) + z * (words[4 * i + 1] & 65535);
      depths[i] = depth;
      if (depth < least) least = depth;
      if (depth > most) most = depth;
    }
    const levels = (KEYS - 1) / Math.max(most - least, 1e-9);
    const starts = new Uint32Array(KEYS + 1);
    for (let i = 0; i < count; i++) {
      const key = ((most - depths[i]) * levels) | 0; // the integer, which an assignment into `keys` would not yield
      keys[i] = key;
      starts[key + 1]++;
    }
    for (let i = 0; i < KEYS; i++) starts[i + 1] += starts[i];
    for (let i = 0; i < count; i++) order[starts[keys[i]]++] = i;
    this.gl.bufferData(this.gl.ARRAY_BUFFER, order, this.gl.DYNAMIC_DRAW);
    this.sorted = forward.join();
  }

  // camera: of `orbitCamera`; background: [red, green, blue] in [0, 1]
  draw(camera, background) {
    const { gl, uniforms, canvas, packed } = this;
    if (!packed || gl.isContextLost()) return;
    if (this.sorted !== camera.forward.join()) this.sort(camera.forward);
    this.bindTarget();
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clearColor(...background, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    gl.uniform3fv(uniforms.low, packed.low);
    gl.uniform3fv(uniforms.extent, packed.extent);
    gl.uniform2fv(uniforms.scales, packed.scales);
    const { right, down, forward } = camera;
    gl.uniformMatrix3fv(uniforms.toCamera, false, [0, 1, 2].flatMap((i) => [right[i], down[i], forward[i]]));
    gl.uniform3fv(uniforms.eye, camera.eye);
    gl.uniform1f(uniforms.focal, camera.focal * canvas.width);
    gl.uniform1f(uniforms.size, canvas.width);
    gl.uniform1f(uniforms.near, camera.near);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, this.count);
    this.copyTarget();
  }
}

// A camera that looks at `target`; angles in degrees, as in ouroboros3d/cameras.py. `tilt` turns the whole orbit about
// the x axis, so that an object seen from `tilt` degrees above stands upright (visualize.turntable_cameras).
function orbitCamera({ azimuth, elevation, distance, target, tilt, fov, near }) {
  const radians = (degrees) => (degrees * Math.PI) / 180;
  const [a, e, t] = [azimuth, elevation, tilt].map(radians);
  const turn = ([x, y, z]) => [x, Math.cos(t) * y - Math.sin(t) * z, Math.sin(t) * y + Math.cos(t) * z];
  const outward = turn([Math.sin(a) * Math.cos(e), Math.sin(e), Math.cos(a) * Math.cos(e)]);
  const right = turn([Math.cos(a), 0, -Math.sin(a)]);
  const forward = outward.map((x) => -x);
  const down = [0, 1, 2].map((i) => {
    const [j, k] = [(i + 1) % 3, (i + 2) % 3];
    return forward[j] * right[k] - forward[k] * right[j];
  });
  const eye = outward.map((x, i) => target[i] + distance * x);
  return { right, down, forward, eye, near, focal: 0.5 / Math.tan(radians(fov) / 2) };
}

// base64 of little-endian words
function decodeWords(text) {
  return new Uint32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
}

// The 3DGS .ply (values before activation) of packed Gaussians, turned by the unit quaternion (w, x, y, z).
function writePly({ words, low, extent, scales }, [w, x, y, z], comment) {
  const names = "x y z f_dc_0 f_dc_1 f_dc_2 opacity scale_0 scale_1 scale_2 rot_0 rot_1 rot_2 rot_3".split(" ");
  const count = words.length / 4;
  const rows = new Float32Array(count * names.length);
  const byte = (word, shift) => (word >>> shift) & 255;
  for (let i = 0; i < count; i++) {
    const [a, b, c, d] = words.subarray(4 * i, 4 * i + 4);
    const p = [a & 65535, a >>> 16, b & 65535].map((value, k) => low[k] + (extent[k] * value) / 65535);
    const uv = [y * p[2] - z * p[1] + w * p[0], z * p[0] - x * p[2] + w * p[1], x * p[1] - y * p[0] + w * p[2]];
    const mean = [p[0] + 2 * (y * uv[2] - z * uv[1]), p[1] + 2 * (z * uv[0] - x * uv[2]), p[2] + 2 * (x * uv[1] - y * uv[0])];
    const opacity = Math.min(Math.max(byte(d, 24) / 255, 1 / 510), 1 - 1 / 510);
    const q = [byte(c, 8), byte(c, 16), byte(c, 24)].map((value) => AXIS * (value / 127.5 - 1));
    const r = Math.sqrt(1 - q[0] * q[0] - q[1] * q[1] - q[2] * q[2]);
    rows.set([
      ...mean,
      ...[0, 8, 16].map((shift) => (byte(d, shift) / 255 - 0.5) / 0.28209479177387814),
      Math.log(opacity / (1 - opacity)),
      ...[byte(b, 16), byte(b, 24), byte(c, 0)].map((value) => scales[0] + (scales[1] * value) / 255),
      w * r - x * q[0] - y * q[1] - z * q[2],
      w * q[0] + x * r + y * q[2] - z * q[1],
      w * q[1] - x * q[2] + y * r + z * q[0],
      w * q[2] + x * q[1] - y * q[0] + z * r,
    ], i * names.length);
  }
  const header = ["ply", "format binary_little_endian 1.0", `comment ${comment}`, `element vertex ${count}`];
  const text = [...header, ...names.map((name) => `property float ${name}`), "end_header", ""].join("\n");
  return new Blob([text, rows], { type: "application/octet-stream" });
}
