// Draws the sample in the element "data": see pipeline/page/data.py for what its numbers mean.
const data = JSON.parse(document.getElementById("data").textContent);
const flow = document.getElementById("flow"), dock = document.getElementById("dock");
const BITS = 1 / Math.LN2, BINS = 240;
const boxes = [];
const losses = Object.keys(data.targets || {});
// What is shown: a chunk, and a token of its teacher's ("t") or student's ("s"); whether a click holds it.
let at = null, held = false, tab = losses[0] || "row";
// A narrow window shows one table at a time, the teacher's row first.
const narrow = matchMedia("(max-width:700px)");

function make(name, attributes = {}, ...inside) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) made.setAttribute(key, value);
  }
  made.append(...inside);
  return made;
}

function svg(name, attributes, ...inside) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...inside);
  return made;
}

// Nodes of a piece: text, sign, text, sign...
function shown(piece) {
  const parts = typeof piece === "string" ? [piece] : piece;
  return parts.map((part, i) => (i % 2 ? make("i", {class: part.length > 1 && !part.includes("×") ? "sign word" : "sign"}, part) : part))
    .filter((part) => part !== "");
}

const spoken = (piece) => (typeof piece === "string" ? piece : piece.join(""));
const isBreak = (part, i) => i % 2 === 1 && part.startsWith("⏎");
const count = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

// Bits by which the teacher was surprised at a token; null where it has no row, or where an import does not say.
function surprise(token) {
  const nats = data.realised[data.row[token]];
  return typeof nats === "number" ? nats * data.unit * BITS : null;
}

const step = (bits) => data.edges.filter((edge) => bits >= edge).length;

// Tokens of a chunk on one side: [first, after the last].
function span(chunk, side) {
  const column = side === "t" ? 0 : 1;
  return [chunk ? data.chunks[chunk - 1][column] : 0, data.chunks[chunk][column]];
}

function token(side, k) {
  const [, piece] = side === "t" ? data.teacher[data.t[k]] : data.student[data.s[k]];
  const bits = side === "t" ? surprise(k) : null, ofStudent = data.learn?.[k] === 0 ? " unlearned" : "";
  const colour = side === "s" ? ofStudent : bits === null ? " none" : ` h${step(bits)}`;
  return make("span", {class: `tok${colour}`, "data-side": side, "data-k": k}, ...shown(piece));
}

function line(side, from, to) {
  const made = make("div", {class: `line ${side}`});
  for (let k = from; k < to; k++) made.append(token(side, k));
  return made;
}

// Of a conversation: which chunk of the targets a box is (-1: none), and the span it is of: [kind, taught].
const targetOf = (box) => data.chunks[box][5] ?? box;
const spanOf = (box) => data.spans?.[data.chunks[box][6]];

function chunkBox(chunk) {
  const [, , piece, , nats] = data.chunks[chunk], teacher = span(chunk, "t"), [kind, taught] = spanOf(chunk) ?? [];
  const made = make("div", {class: "chunk", tabindex: -1, "data-chunk": chunk, role: "button"}, line("t", ...teacher));
  if (nats === null) made.classList.add(!data.spans ? "norow" : taught ? "lost" : "untaught");
  if (kind) made.dataset.kind = kind;
  let says = `${spoken(piece) || "end"}, ${nats === null ? "no row" : `${(nats * data.unit * BITS).toFixed(1)} bits`}`;
  if (data.s) {
    const student = span(chunk, "s"), sizes = [teacher[1] - teacher[0], student[1] - student[0]];
    made.append(make("div", {class: "line text"}, make("bdi", {dir: "auto"}, ...shown(piece))), line("s", ...student));
    if (sizes[0] !== 1 || sizes[1] !== 1) made.classList.add("many");
    says += `, ${sizes[0]} to ${sizes[1]}`;
  } else made.classList.add("alone");
  made.setAttribute("aria-label", says);
  return made;
}

// What lies after the last chunk: tokens without a counterpart.
function tail() {
  const last = data.chunks.length - 1, ends = last < 0 ? [0, 0] : data.chunks[last];
  if (!data.s || (ends[0] === data.t.length && ends[1] === data.s.length)) return;
  const text = make("div", {class: "line text"}, make("small", {}, "in no chunk"));
  flow.append(make("div", {class: "chunk tail norow"}, line("t", ends[0], data.t.length), text, line("s", ends[1], data.s.length)));
}

// After a line's end the next line begins, as far in as spaces say.
function breakLine(piece, into) {
  const last = typeof piece === "string" ? -1 : piece.findLastIndex(isBreak);
  if (last < 0) return;
  const after = piece.slice(last + 1).filter((part) => part !== ""), indent = make("div", {class: "indent"});
  const spaces = after.reduce((sum, sign) => sum + ({"·": 1, "⇥": 4}[sign[0]] ?? NaN) * Number(sign.slice(2) || 1), 0) || 0;
  indent.style.width = `${0.4 * spaces}rem`;
  into.append(make("div", {class: "break"}), ...(spaces ? [indent] : []));
}

// What is said of a part of a turn that is not its content.
const PART_OF = {thinking: "thinking", call: "tool call", marker: "thinking"};

// A turn: who speaks, beside the boxes; what the template writes between turns is a small row of its own.
function turnBox({role, message, taught}) {
  const who = make("div", {class: "who"}, make("b", {}, role));
  if (message >= 0) who.append(make("small", {}, `message ${message + 1}`));
  if (role === "assistant") who.append(make("small", {class: taught ? "taught" : null}, taught ? "taught" : "not taught"));
  const inside = make("div", {class: "boxes"});
  flow.append(make("section", {class: `turn ${role}${taught ? " taught" : ""}`, "aria-label": role}, who, inside));
  return inside;
}

function drawTurns() {
  let next = 0;
  for (const turn of data.turns) {
    const inside = turnBox(turn);
    let part = null;
    for (; next < boxes.length && data.chunks[next][6] < turn.spans[1]; next++) {
      const word = PART_OF[spanOf(next)[0]] ?? null;
      if (word !== part && word) inside.append(make("div", {class: "part"}, word));
      else if (part && word !== part && spanOf(next)[0] === "assistant") inside.append(make("div", {class: "part"}, "answer"));
      part = word;
      inside.append(boxes[next]);
      breakLine(data.chunks[next][2], inside);
    }
  }
}

function drawFlow() {
  data.chunks.forEach((_, i) => boxes.push(chunkBox(i)));
  if (data.turns) drawTurns();
  else {
    data.chunks.forEach((chunk, i) => {
      flow.append(boxes[i]);
      breakLine(chunk[2], flow);
    });
    tail();
  }
  if (boxes.length) boxes[0].tabIndex = 0;
}

function drawLegend() {
  const counts = Array(data.edges.length + 1).fill(0);
  data.realised.filter((nats) => typeof nats === "number").forEach((nats) => counts[step(nats * data.unit * BITS)]++);
  const legend = document.getElementById("legend");
  legend.append(make("span", {}, "bits of surprise, and how many tokens:"));
  counts.forEach((n, i) => {
    const [low, high] = [data.edges[i - 1], data.edges[i]];
    const range = i === 0 ? `< ${high}` : high === undefined ? `≥ ${low}` : `${low}–${high}`;
    legend.append(make("span", {}, make("b", {class: `h${i}`}, range), n.toLocaleString("en")));
  });
  const none = data.row.filter((row) => row < 0).length, [how, word] = data.spans ? ["untaught", "not taught"] : ["norow", "no row"];
  if (none) legend.append(make("span", {}, make("b", {class: how}, "\u00a0"), `${word}: ${none.toLocaleString("en")}`));
}

// Bits per byte in equal stretches of the text, and the chunk that each begins in.
function stretches() {
  const bins = Math.max(1, Math.min(BINS, data.bytes)), width = data.bytes / bins;
  const bits = Array(bins).fill(0), chunk = Array(bins).fill(0), taught = Array(bins).fill(0);
  let start = 0;
  data.chunks.forEach(([, , , size, nats], i) => {
    for (let bin = Math.floor(start / width); bin < bins && bin * width < start + size; bin++) {
      const shared = Math.min(start + size, (bin + 1) * width) - Math.max(start, bin * width);
      bits[bin] += size && nats !== null ? (nats * data.unit * BITS * shared) / size : 0;
      taught[bin] += nats !== null ? shared / width : 0;
      if (bin * width >= start) chunk[bin] = i;
    }
    start += size;
  });
  return {rate: bits.map((value) => value / width), chunk, width, taught};
}

function drawStrip() {
  const {rate, chunk, width, taught} = stretches(), most = Math.max(...rate, 1e-9), high = 100;
  const picture = svg("svg", {viewBox: `0 0 ${rate.length} ${high}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `bits per byte along the sample, at most ${most.toFixed(1)}; a click goes to the text`});
  rate.forEach((value, bin) => {
    const tall = (high * value) / most;
    if (data.spans && taught[bin] < 0.5) picture.append(svg("rect", {class: "untaught", x: bin, y: 0, width: 1, height: high}));
    const words = `byte ${Math.round(bin * width)}: ${value.toFixed(2)} bits per byte`;
    picture.append(svg("rect", {class: "bar", x: bin, y: high - tall, width: 0.85, height: tall}));
    picture.append(svg("rect", {class: "spot", x: bin, y: 0, width: 1, height: high, "data-chunk": chunk[bin]}, svg("title", {}, words)));
  });
  if (data.bpb !== null) {
    const y = high - (high * data.bpb) / most;
    picture.append(svg("line", {x1: 0, x2: rate.length, y1: y, y2: y}));
  }
  picture.addEventListener("click", (event) => {
    const found = event.target.closest("[data-chunk]");
    if (found) go(Number(found.dataset.chunk), true);
  });
  const ends = [make("span", {}, "byte 0"), make("span", {}, `top ${most.toFixed(1)}${data.bpb === null ? "" : `, dashed: mean ${data.bpb.toFixed(2)}`}`)];
  document.getElementById("strip").append(picture, make("p", {}, ...ends, make("span", {}, data.bytes.toLocaleString("en"))));
}

// Where a chunk is in the strip.
function mark(chunk) {
  const bars = document.querySelectorAll("#strip rect.bar"), before = data.chunks.slice(0, chunk).reduce((sum, one) => sum + one[3], 0);
  bars.forEach((bar) => bar.classList.remove("here"));
  bars[Math.min(bars.length - 1, Math.floor((before * bars.length) / Math.max(1, data.bytes)))]?.classList.add("here");
}

// Show a chunk and one of its tokens; the first of the teacher's unless another is named.
function show(chunk, side = "t", k = span(chunk, "t")[0]) {
  document.querySelectorAll(".on").forEach((one) => one.classList.remove("on"));
  at = {chunk, side, k};
  boxes[chunk].classList.add("on");
  boxes[chunk].querySelector(`[data-side="${side}"][data-k="${k}"]`)?.classList.add("on");
  mark(chunk);
  drawDock();
}

function go(chunk, centred = false) {
  const to = Math.max(0, Math.min(boxes.length - 1, chunk));
  boxes.forEach((box, i) => (box.tabIndex = i === to ? 0 : -1));
  held = false;
  boxes[to].focus({preventScroll: true, focusVisible: true});
  boxes[to].scrollIntoView({block: centred ? "center" : "nearest"});
}

// The token after this one in its chunk, or before it: the teacher's first, then the student's.
function within(by) {
  const every = [...boxes[at.chunk].querySelectorAll(".tok")];
  const now = every.findIndex((one) => one.dataset.side === at.side && Number(one.dataset.k) === at.k);
  const next = every[Math.max(0, Math.min(every.length - 1, now + by))];
  if (next) show(at.chunk, next.dataset.side, Number(next.dataset.k));
}

function hold(yes) {
  held = yes;
  if (at) drawDock();
}

function point(event) {
  const box = event.target.closest(".chunk:not(.tail)"), found = event.target.closest(".tok");
  if (!box) return;
  const chunk = Number(box.dataset.chunk);
  if (found) show(chunk, found.dataset.side, Number(found.dataset.k));
  else if (!at || at.chunk !== chunk) show(chunk);
}

const KEYS = {
  ArrowRight: () => go(at ? at.chunk + 1 : 0), ArrowLeft: () => go(at ? at.chunk - 1 : 0),
  ArrowDown: () => within(1), ArrowUp: () => within(-1),
  Home: () => go(0), End: () => go(boxes.length - 1), Enter: () => hold(!held), " ": () => hold(!held),
};

function listen() {
  flow.addEventListener("mouseover", (event) => held || point(event));
  flow.addEventListener("click", (event) => { held = false; point(event); hold(true); });
  flow.addEventListener("focusin", (event) => {
    const box = event.target.closest(".chunk");
    if (box && !held && (!at || at.chunk !== Number(box.dataset.chunk))) show(Number(box.dataset.chunk));
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hold(false);
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    if (!boxes.length || (event.target !== document.body && !flow.contains(event.target))) return;
    if (!at && event.key.startsWith("Arrow")) go(0);
    else if (at || !["Enter", " "].includes(event.key)) KEYS[event.key]();
    event.preventDefault();
  });
}

function fit() {
  tab = narrow.matches || !losses.length ? "row" : losses[0];
  if (at) drawDock();
}

function start() {
  narrow.addEventListener("change", fit);
  fit();
  drawLegend();
  drawStrip();
  drawFlow();
  listen();
  drawDock();
}
