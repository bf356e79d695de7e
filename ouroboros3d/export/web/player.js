// The recursion player: every step of the loop as an object to turn, beside the pictures that made it.
// `createPlayer(root, data)` fills `root`; `data` is what ouroboros3d/export/player.py writes.

const MARKUP = `
  <header><h1></h1><p class="about"></p></header>
  <main>
    <section class="object">
      <div class="frame">
        <canvas tabindex="0" aria-label="3D object; drag to turn, wheel or pinch to zoom"></canvas>
        <p class="notice" hidden></p>
      </div>
      <div class="steps">
        <button class="play" title="Play the steps (space)" aria-label="Play the steps">▶</button>
        <input class="step" type="range" min="0" step="1" value="0" aria-label="Step of the loop">
        <output></output>
      </div>
      <div class="tools">
        <button class="spin" title="Turn by itself (O)" aria-pressed="false">Auto-rotate</button>
        <button class="reset" title="Back to the input's view (R)">Reset view</button>
        <label title="Background colour (B)">Background <input class="background" type="color"></label>
        <button class="ply" title="Gaussians of this step as a 3DGS .ply">.ply</button>
        <button class="png" title="This view as a picture">.png</button>
      </div>
      <details>
        <summary>Keys</summary>
        <p><kbd>←</kbd> <kbd>→</kbd> step · <kbd>W</kbd> <kbd>A</kbd> <kbd>S</kbd> <kbd>D</kbd> turn ·
        <kbd>+</kbd> <kbd>−</kbd> zoom · <kbd>1</kbd>–<kbd>9</kbd> look from a predicted view · <kbd>space</kbd> play ·
        <kbd>O</kbd> auto-rotate · <kbd>R</kbd> reset · <kbd>B</kbd> background</p>
      </details>
    </section>
    <section class="pictures"></section>
  </main>`;

const CAPTIONS = {
  input: "Input, as the networks see it",
  views: "Predicted views of this step",
  rgb: "Feedback: colour, rendered from the Gaussians",
  ccm: "Feedback: canonical coordinates",
};
const SPIN = 30; // degrees per second
const PLAY = 350; // milliseconds per step
const TURN = 0.5; // degrees per pixel of a drag

function createPlayer(root, data, keys = root) {
  root.innerHTML = MARKUP;
  root.classList.add("o3d");
  const find = (selector) => root.querySelector(selector);
  const canvas = find("canvas");
  const steps = [];
  const home = { azimuth: 0, elevation: data.elevation, distance: data.distance };
  const view = { ...home };
  let current = -1;
  let spinning = false;
  let playing = null;
  let background = data.background;
  let renderer = null;
  let asked = 0; // the animation frame that will draw

  // ---------------------------------------------------------------- drawing

  function camera() {
    return orbitCamera({ ...view, target: data.target, tilt: data.elevation, fov: data.fov, near: data.near });
  }

  function redraw() {
    if (!asked && renderer) asked = requestAnimationFrame(frame);
  }

  function frame(now) {
    asked = 0;
    if (spinning) {
      view.azimuth += SPIN * Math.min(0.1, (now - (frame.last ?? now)) / 1000);
      asked = requestAnimationFrame(frame);
    }
    frame.last = spinning ? now : undefined;
    renderer.draw(camera(), background);
  }

  function fit() {
    const pixels = Math.round(canvas.clientWidth * Math.min(window.devicePixelRatio || 1, 2));
    if (pixels > 0) canvas.width = canvas.height = pixels;
    redraw();
  }

  function startRenderer() {
    try {
      renderer = new SplatRenderer(canvas);
    } catch (error) {
      canvas.hidden = true;
      find(".notice").hidden = false;
      find(".notice").textContent =
        `This browser cannot show the object in 3D (${error.message}). The pictures of every step are on this page.`;
      for (const name of [".spin", ".reset", ".png"]) find(name).disabled = true;
      return;
    }
    new ResizeObserver(fit).observe(canvas);
    canvas.addEventListener("redraw", redraw);
  }

  // ---------------------------------------------------------------- steps

  function addStep(step) {
    steps.push({ ...step, words: null });
    find(".step").max = steps.length - 1;
    root.classList.toggle("single", steps.length < 2);
    show(steps.length - 1);
  }

  function packed(step) {
    step.words ??= decodeWords(step.gaussians);
    return step;
  }

  function show(index) {
    if (!steps.length) return;
    current = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[current];
    find(".step").value = current;
    find("output").textContent = describe(step);
    showPictures({ input: data.input, ...step.pictures });
    if (renderer) renderer.load(packed(step));
    redraw();
  }

  function describe(step) {
    const count = `${(packed(step).words.length / 4).toLocaleString("en")} Gaussians`;
    if (step.sigma == null) return count;
    return `step ${step.index + 1} of ${data.total ?? steps.length} · σ ${Number(step.sigma.toPrecision(3))} · ${count}`;
  }

  function showPictures(pictures) {
    for (const [name, caption] of Object.entries(CAPTIONS)) {
      let figure = find(`figure.${name}`);
      if (!pictures[name]) {
        figure?.remove();
        continue;
      }
      if (!figure) {
        figure = document.createElement("figure");
        figure.className = name;
        figure.append(document.createElement("figcaption"), new Image());
        figure.firstChild.textContent = caption;
        figure.lastChild.alt = caption;
        if (name !== "input") lookOnClick(figure.lastChild);
        find(".pictures").append(figure);
      }
      if (figure.lastChild.src !== pictures[name]) figure.lastChild.src = pictures[name];
    }
  }

  // A click on a view of a sheet turns the object to that view.
  function lookOnClick(image) {
    image.title = "Click a view to look from there";
    image.addEventListener("click", (event) => {
      const rows = Math.ceil(data.azimuths.length / data.columns);
      const column = Math.floor((event.offsetX / image.clientWidth) * data.columns);
      lookFrom(Math.floor((event.offsetY / image.clientHeight) * rows) * data.columns + column);
    });
  }

  function lookFrom(index) {
    if (index < data.azimuths.length) look({ ...home, azimuth: data.azimuths[index] });
  }

  function look(change) {
    Object.assign(view, change);
    view.elevation = Math.max(-89, Math.min(89, view.elevation));
    view.distance = Math.max(0.35 * home.distance, Math.min(4 * home.distance, view.distance));
    redraw();
  }

  function turn(azimuth, elevation) {
    look({ azimuth: view.azimuth + azimuth, elevation: view.elevation + elevation });
  }

  function zoom(factor) {
    look({ distance: view.distance * factor });
  }

  // ---------------------------------------------------------------- buttons

  function spin(on = !spinning) {
    spinning = on;
    find(".spin").setAttribute("aria-pressed", on);
    redraw();
  }

  function play(on = !playing) {
    clearInterval(playing);
    playing = on ? setInterval(next, PLAY) : null;
    find(".play").textContent = on ? "❚❚" : "▶";
    if (on && current === steps.length - 1) show(0);
  }

  function next() {
    if (current < steps.length - 1) show(current + 1);
    else play(false);
  }

  function setBackground(colour) {
    background = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16) / 255);
    find(".background").value = colour;
    redraw();
  }

  function download(url, suffix) {
    const link = document.createElement("a");
    const step = steps[current].sigma == null ? "" : `_step_${String(steps[current].index).padStart(2, "0")}`;
    link.href = url;
    link.download = `${data.name}${step}${suffix}`;
    link.click();
  }

  function downloadPly() {
    const url = URL.createObjectURL(ply());
    download(url, ".ply");
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }

  function ply() {
    return writePly(packed(steps[current]), data.ply.quaternion, data.ply.comment);
  }

  // The current step as a PNG data URL of `size` x `size` pixels, or of the canvas as it is.
  function snapshot(change = {}, size = canvas.width) {
    const before = { ...view };
    const pixels = canvas.width;
    Object.assign(view, change);
    canvas.width = canvas.height = size;
    renderer.draw(camera(), background);
    const url = canvas.toDataURL("image/png");
    Object.assign(view, before);
    canvas.width = canvas.height = pixels;
    redraw();
    return url;
  }

  // Median milliseconds of `frames` directions at `size` pixels: the sort alone, and with the drawing.
  function time(frames, size) {
    const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    const { gl } = renderer;
    const [sorts, wholes] = [[], []];
    canvas.width = canvas.height = size;
    for (let i = 0; i < frames; i++) {
      const at = orbitCamera({ ...home, azimuth: (i * 360) / frames, target: data.target, tilt: 0, fov: data.fov, near: data.near });
      const start = performance.now();
      renderer.sort(at.forward);
      sorts.push(performance.now() - start);
      renderer.draw(at, background);
      gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4)); // waits for the drawing
      wholes.push(performance.now() - start);
    }
    fit();
    return { sort: median(sorts), frame: median(wholes) };
  }

  // ---------------------------------------------------------------- input

  function listenToPointers() {
    const pointers = new Map();
    const spread = () => {
      const [a, b] = [...pointers.values()];
      return Math.hypot(a.x - b.x, a.y - b.y);
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    });
    canvas.addEventListener("pointermove", (event) => {
      const from = pointers.get(event.pointerId);
      if (!from) return;
      const before = pointers.size === 2 ? spread() : 0;
      const [dx, dy] = [event.clientX - from.x, event.clientY - from.y];
      pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
      if (pointers.size === 1) turn(-dx * TURN, dy * TURN);
      else if (pointers.size === 2) zoom(before / Math.max(1, spread()));
    });
    for (const end of ["pointerup", "pointercancel"])
      canvas.addEventListener(end, (event) => pointers.delete(event.pointerId));
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      zoom(Math.exp(event.deltaY * (event.deltaMode ? 0.05 : 0.0015)));
    }, { passive: false });
  }

  const KEYS_OF = {
    ArrowLeft: () => show(current - 1), ArrowRight: () => show(current + 1), Home: () => show(0),
    End: () => show(steps.length - 1), " ": () => play(), a: () => turn(-5, 0), d: () => turn(5, 0),
    w: () => turn(0, 5), s: () => turn(0, -5), "+": () => zoom(0.9), "=": () => zoom(0.9), "-": () => zoom(1 / 0.9),
    o: () => spin(), r: () => look(home), b: () => find(".background").click(),
  };

  function listenToKeys() {
    keys.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || /INPUT|BUTTON|SUMMARY|TEXTAREA|SELECT/.test(event.target.tagName))
        return;
      const act = /^[1-9]$/.test(event.key) ? () => lookFrom(event.key - 1) : KEYS_OF[event.key] ?? KEYS_OF[event.key.toLowerCase()];
      if (!act) return;
      event.preventDefault();
      act();
    });
  }

  function listenToButtons() {
    find(".step").addEventListener("input", (event) => show(Number(event.target.value)));
    find(".background").addEventListener("input", (event) => setBackground(event.target.value));
    find(".play").addEventListener("click", () => play());
    find(".spin").addEventListener("click", () => spin());
    find(".reset").addEventListener("click", () => look(home));
    find(".ply").addEventListener("click", downloadPly);
    find(".png").addEventListener("click", () => download(snapshot(), ".png"));
  }

  function close() {
    spin(false);
    play(false);
    renderer?.gl.getExtension("WEBGL_lose_context")?.loseContext();
    renderer = null;
  }

  find("h1").textContent = data.title;
  find(".about").textContent = data.about;
  startRenderer();
  listenToPointers();
  listenToKeys();
  listenToButtons();
  setBackground("#" + data.background.map((x) => Math.round(x * 255).toString(16).padStart(2, "0")).join(""));
  data.steps.forEach(addStep);
  return { close, addStep, show, look, spin, play, snapshot, time, ply, setBackground, count: () => steps.length, view };
}
