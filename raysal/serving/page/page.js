// The page: sends images to the endpoint it came from, draws what it answers. No library, nothing from elsewhere.
const $ = (id) => document.getElementById(id);
const [stage, canvas] = [$("stage"), $("canvas")];
const images = []; // {name, file, bitmap, answer, mask, doubt, hidden}
let current = null;
const view = { scale: 1, x: 0, y: 0 };

const token = $("token");
token.value = sessionStorage.getItem("token") ?? "";
token.addEventListener("change", () => { sessionStorage.setItem("token", token.value.trim()); say(""); about(); });

const say = (text) => { $("said").textContent = text; };

async function ask(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if (token.value.trim()) headers.Authorization = `Bearer ${token.value.trim()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({ title: `the endpoint answered ${response.status}` }));
  if (response.status === 401) { $("access").hidden = false; $("access").open = true; token.focus(); }
  throw Object.assign(new Error(problem.title), { status: response.status, after: Number(response.headers.get("Retry-After")) });
}

async function patiently(path, options) {
  for (let tries = 0; ; tries += 1) {
    try { return await ask(path, options); } catch (error) {
      if (![429, 503].includes(error.status) || tries === 20) throw error;
      await new Promise((go) => setTimeout(go, 1000 * (error.after || 1)));
    }
  }
}

async function about() {
  try {
    const model = await (await ask("v1/model")).json();
    const miou = model.val_miou == null ? "" : `, val mIoU ${model.val_miou.toFixed(3)}`;
    $("model").textContent = `${model.label_set}, ${model.encoder}, model ${model.digest.slice(0, 12)}${miou}`;
  } catch (error) { $("model").textContent = error.message; }
}

// COCO's compressed counts: 5 bits a character, runs of not and inside by turns, column by column; from the third on as differences.
function runs(text) {
  const found = [];
  for (let p = 0; p < text.length;) {
    let value = 0, shift = 0, code;
    do { code = text.charCodeAt(p) - 48; p += 1; value |= (code & 31) << shift; shift += 5; } while (code & 32);
    if (code & 16 && shift < 32) value |= -1 << shift;
    if (found.length > 2) value += found[found.length - 2];
    found.push(value);
  }
  return found;
}

function maskOf(answer) {
  const { width, height } = answer, ids = new Uint8Array(width * height).fill(255);
  for (const { id, segmentation } of answer.classes) {
    if (!segmentation) continue;
    let at = 0, inside = false;
    for (const run of runs(segmentation.counts)) {
      if (inside) for (let k = at; k < at + run; k += 1) ids[(k % height) * width + Math.floor(k / height)] = id;
      at += run; inside = !inside;
    }
  }
  return ids;
}

async function bytesOf(png) {
  const blob = new Blob([Uint8Array.from(atob(png), (c) => c.charCodeAt(0))], { type: "image/png" });
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none" });
  const c = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  c.drawImage(bitmap, 0, 0);
  const { data } = c.getImageData(0, 0, bitmap.width, bitmap.height);
  return Uint8Array.from({ length: data.length / 4 }, (_, k) => data[4 * k]);
}

// An image without its EXIF (APP1 of JPEG, eXIf of PNG): browsers turn by it, but masks refer to the raster, not to how a camera was held.
async function unturned(file) {
  const bytes = new Uint8Array(await file.arrayBuffer()), data = new DataView(bytes.buffer), kept = [];
  if (bytes.length < 12) return file;
  const jpeg = data.getUint16(0) === 0xffd8, png = data.getUint32(0) === 0x89504e47;
  let from = 0, at = jpeg ? 2 : png ? 8 : bytes.length;
  while (at + 8 <= bytes.length) {
    const marker = data.getUint16(at);
    if (jpeg && (marker < 0xffc0 || marker === 0xffda)) break; // the scan begins
    const exif = jpeg ? marker === 0xffe1 : data.getUint32(at + 4) === 0x65584966;
    const next = at + (jpeg ? 2 + data.getUint16(at + 2) : 12 + data.getUint32(at));
    if (exif) { kept.push(bytes.subarray(from, at)); from = next; }
    at = next;
  }
  return new Blob([...kept, bytes.subarray(from)], { type: file.type });
}

async function add(files) {
  say("");
  await Promise.all([...files].map(async (file) => {
    const image = { name: file.name, file, hidden: new Set() };
    images.push(image);
    list();
    try {
      image.bitmap = await createImageBitmap(await unturned(file)).catch(() => null);
      const headers = { Accept: "application/json", "Content-Type": "application/octet-stream", "X-Image-Name": encodeURIComponent(file.name) };
      image.answer = await (await patiently("v1/masks?view=uncertainty", { method: "POST", body: file, headers })).json();
      image.answer.name = file.name;
      image.mask = maskOf(image.answer);
      image.doubt = await bytesOf(image.answer.map_png);
      if (!current || !current.answer) show(image);
    } catch (error) { image.failed = error.message; say(`${file.name}: ${error.message}`); }
    list();
  }));
}

// Buttons stay the same elements: a new one in the place of another would take the keyboard's focus away.
function list() {
  for (const image of images) {
    if (!image.button) {
      image.button = Object.assign(document.createElement("button"), { type: "button" });
      image.button.addEventListener("click", () => show(image));
      const item = document.createElement("li");
      item.append(image.button);
      $("list").append(item);
    }
    const { button, failed, answer, name } = image, state = failed ? `: ${failed}` : answer ? "" : " …";
    Object.assign(button, { textContent: name + state, title: failed ?? name, className: failed ? "failed" : "", disabled: !answer });
    button.setAttribute("aria-current", image === current);
  }
}

const percent = (share) => (share == null ? "–" : `${(100 * share).toFixed(share < 0.0995 ? 2 : 1)}%`);

function show(image) {
  current = image;
  const { answer } = image;
  $("see").hidden = $("tell").hidden = false;
  $("name").textContent = image.name;
  const numbers = {
    Size: `${answer.width} × ${answer.height}`, Confidence: percent(answer.confidence), Abstained: percent(answer.abstained),
    Entropy: answer.scores.entropy.toFixed(3), Uncertainty: answer.scores.uncertainty.toFixed(3), Model: answer.model_digest.slice(0, 12),
  };
  $("numbers").replaceChildren(...Object.entries(numbers).flatMap(([k, v]) => [
    Object.assign(document.createElement("dt"), { textContent: k }), Object.assign(document.createElement("dd"), { textContent: v }),
  ]));
  const shares = [...answer.classes].sort((a, b) => b.fraction - a.fraction);
  $("legend").replaceChildren(...shares.map((c) => {
    const [item, label, box, patch] = ["li", "label", "input", "i"].map((tag) => document.createElement(tag));
    Object.assign(box, { type: "checkbox", checked: !image.hidden.has(c.id) });
    box.addEventListener("change", () => { image.hidden[box.checked ? "delete" : "add"](c.id); draw(); });
    patch.style.background = `rgb(${c.color})`;
    label.append(box, patch, Object.assign(document.createElement("span"), { textContent: c.name }),
      Object.assign(document.createElement("span"), { textContent: percent(c.fraction) }));
    item.append(label);
    return item;
  }));
  const stem = image.name.replace(/\.[^.]*$/, "");
  const { map_png: _, ...told } = answer;
  link($("json"), new Blob([JSON.stringify(told, null, 1)], { type: "application/json" }), `${stem}.json`);
  unlink($("png")); // until its own mask is there
  const mine = (act) => (what) => { if (image === current) act(what); };
  indexPng(image).then(mine((blob) => link($("png"), blob, `${stem}_mask.png`))).catch(mine((error) => say(error.message)));
  [canvas.width, canvas.height] = [answer.width, answer.height];
  draw();
  fit();
  list();
}

function unlink(anchor) {
  if (anchor.href) URL.revokeObjectURL(anchor.href);
  anchor.removeAttribute("href");
}

function link(anchor, blob, name) {
  unlink(anchor);
  Object.assign(anchor, { href: URL.createObjectURL(blob), download: name });
}

// The mask file is the endpoint's own: a browser would write colours.
async function indexPng(image) {
  const headers = { Accept: "image/png", "Content-Type": "application/octet-stream" };
  image.png ??= await (await patiently("v1/masks", { method: "POST", body: image.file, headers })).blob();
  return image.png;
}

function draw() {
  const { answer, bitmap, mask, doubt, hidden } = current, { width, height } = answer;
  const c = canvas.getContext("2d");
  c.fillStyle = "#777";
  c.fillRect(0, 0, width, height);
  if (bitmap) c.drawImage(bitmap, 0, 0, width, height);
  const what = $("view").value;
  if (what === "image") return;
  const over = new ImageData(width, height), alpha = Math.round(2.55 * $("opacity").value);
  const colors = new Map(answer.classes.map((k) => [k.id, k.color]));
  for (let k = 0; k < mask.length; k += 1) {
    if (what === "uncertainty") over.data.set([255, 255 - doubt[k], 40, Math.min(alpha, 40 + doubt[k])], 4 * k);
    else if (mask[k] !== 255 && !hidden.has(mask[k])) over.data.set([...colors.get(mask[k]), alpha], 4 * k);
  }
  const layer = new OffscreenCanvas(width, height);
  layer.getContext("2d").putImageData(over, 0, 0);
  c.drawImage(layer, 0, 0);
}

function place() {
  canvas.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  canvas.classList.toggle("near", view.scale > 2);
}
function fit() {
  const { clientWidth: w, clientHeight: h } = stage;
  view.scale = Math.min(w / canvas.width, h / canvas.height);
  [view.x, view.y] = [(w - canvas.width * view.scale) / 2, (h - canvas.height * view.scale) / 2];
  place();
}
function zoom(factor, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const scale = Math.min(40, Math.max(0.02, view.scale * factor)), by = scale / view.scale;
  [view.x, view.y, view.scale] = [x - (x - view.x) * by, y - (y - view.y) * by, scale];
  place();
}
function move(dx, dy) { view.x += dx; view.y += dy; place(); }

const pointers = new Map();
stage.addEventListener("pointerdown", (e) => { pointers.set(e.pointerId, e); stage.setPointerCapture(e.pointerId); });
for (const end of ["pointerup", "pointercancel"]) stage.addEventListener(end, (e) => pointers.delete(e.pointerId));
stage.addEventListener("pointermove", (e) => {
  under(e);
  const before = pointers.get(e.pointerId);
  if (!before) return;
  if (pointers.size === 1) move(e.clientX - before.clientX, e.clientY - before.clientY);
  else {
    const other = [...pointers.values()].find((p) => p.pointerId !== e.pointerId), box = stage.getBoundingClientRect();
    const apart = (p) => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
    if (apart(before) > 0) zoom(apart(e) / apart(before), (e.clientX + other.clientX) / 2 - box.left, (e.clientY + other.clientY) / 2 - box.top);
  }
  pointers.set(e.pointerId, e);
});
stage.addEventListener("wheel", (e) => {
  e.preventDefault();
  const box = stage.getBoundingClientRect();
  zoom(Math.exp(-e.deltaY / 400), e.clientX - box.left, e.clientY - box.top);
}, { passive: false });

function under(e) {
  if (!current) return;
  const box = stage.getBoundingClientRect(), { answer, mask, doubt } = current;
  const x = Math.floor((e.clientX - box.left - view.x) / view.scale), y = Math.floor((e.clientY - box.top - view.y) / view.scale);
  if (x < 0 || y < 0 || x >= answer.width || y >= answer.height) { $("under").textContent = ""; return; }
  const k = y * answer.width + x, name = answer.classes.find((c) => c.id === mask[k])?.name ?? "no class";
  $("under").textContent = `${x}, ${y}: ${name}, uncertainty ${(doubt[k] / 255).toFixed(2)}`;
}

addEventListener("keydown", (e) => {
  if (!current || e.ctrlKey || e.metaKey || e.altKey || e.target.matches("input, select")) return;
  const keys = {
    m: () => { $("view").value = $("view").value === "image" ? "mask" : "image"; draw(); },
    "+": () => zoom(1.25), "=": () => zoom(1.25), "-": () => zoom(0.8), 0: fit,
    ArrowLeft: () => move(40, 0), ArrowRight: () => move(-40, 0), ArrowUp: () => move(0, 40), ArrowDown: () => move(0, -40),
  };
  if (!keys[e.key]) return;
  e.preventDefault();
  keys[e.key]();
});

$("view").addEventListener("change", draw);
$("opacity").addEventListener("input", draw);
$("in").addEventListener("click", () => zoom(1.25));
$("out").addEventListener("click", () => zoom(0.8));
$("fit").addEventListener("click", fit);
addEventListener("resize", () => current && fit());

$("files").addEventListener("change", (e) => add(e.target.files));
addEventListener("dragover", (e) => { e.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", (e) => { e.preventDefault(); $("drop").classList.remove("over"); add(e.dataTransfer.files); });
for (const button of document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", async () => {
    try {
      const blob = await (await ask(`examples/${button.dataset.example}`)).blob();
      await add([new File([blob], `scene_${button.dataset.example}.png`, { type: "image/png" })]);
    } catch (error) { say(error.message); }
  });
}
about();
