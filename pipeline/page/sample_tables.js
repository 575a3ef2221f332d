// The dock: the teacher's row at a token, and beside it what each loss makes of the chunk.
const MOVED_TO = {"-1": "tail mass", "-2": "nowhere"};
const MOST_OTHERS = 8;

function percent(p) {
  const v = 100 * p;
  if (v === 0) return "0 %";
  return `${v >= 99.995 ? v.toFixed(0) : v >= 10 ? v.toFixed(1) : v >= 1 ? v.toFixed(2) : v >= 0.001 ? v.toFixed(3) : v.toExponential(1)} %`;
}

const nats = (value) => (value === 0 ? "0" : `−${value.toFixed(3)}`);
const piece = (side, place) => make("span", {class: "piece"}, ...shown((side === "t" ? data.teacher : data.student)[place][1]));
const list = (places, side) => places.flatMap((place, i) => (i ? [" ", piece(side, place)] : [piece(side, place)]));

// One row of a table: rank, what, a bar, probability, nats.
function entry(rank, name, value, {kind = null, id = null} = {}) {
  const p = value === null ? 0 : Math.exp(-value), bar = make("b", {"data-p": kind === "rest" ? null : p});
  return make("tr", {class: kind, title: id === null ? null : `id ${id}`}, make("td", {}, String(rank)), make("td", {class: "name"}, ...name),
    make("td", {class: "bar"}, bar), make("td", {class: "p"}, percent(p)), make("td", {class: "nats"}, value === null ? "−∞" : nats(value)));
}

function table(rows, what = "token") {
  const head = ["", what, "", "p", "nats"].map((word, i) => make("th", {class: ["", "name", "bar", "", "nats"][i]}, word));
  return make("div", {class: "scroll", tabindex: 0}, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
}

// [place, nats] of each entry of gap-coded ones.
function entries(places, gaps, unit) {
  let level = 0;
  return gaps.map((gap, i) => [places[i], (level += gap) * unit]);
}

function restRow(rest, unit) {
  if (rest === "?") return entry("", ["tail mass: unknown at this temperature"], null, {kind: "rest"});
  return entry("", ["tail mass", make("small", {}, rest === null ? " none" : " all others")], rest === null ? null : rest * unit, {kind: "rest"});
}

function destination(place) {
  const to = data.moved?.[place];
  if (to === undefined) return [];
  return [make("small", {class: "moved"}, " → ", ...(to < 0 ? [MOVED_TO[to]] : [piece("t", to)]))];
}

const unseen = () => (data.draws ? "not drawn" : "not kept");

function rowPane(k) {
  const bits = surprise(k), title = ["Teacher's row at ", piece("t", data.t[k])];
  const why = data.spans ? "not taught, so no row" : "no row: nothing stood before it";
  const row = data.rows?.[data.row[k]];
  if (bits === null && !row) return pane("row", [...title, make("small", {}, why)]);
  const real = data.realised[data.row[k]] * data.unit;
  const rank = row ? row[0].indexOf(data.t[k]) : -1, place = !row ? "" : rank < 0 ? `, ${unseen()}` : `, rank ${rank + 1}`;
  const known = bits === null ? "the source does not say what it gives the text's" : `${bits.toFixed(2)} bits of surprise, ${percent(Math.exp(-real))}`;
  title.push(make("small", {}, `${known}${place}`));
  if (!row) return pane("row", [...title, make("small", {}, "the row was left out of this subset")]);
  if (data.entropy) title.push(make("small", {}, `entropy ${(data.entropy[data.row[k]] * data.unit).toFixed(2)} nats`));
  const mark = () => make("small", {}, " ◂ in the text");
  const rows = entries(row[0], row[1], data.step).map(([place, value], i) => {
    const isReal = place === data.t[k], name = [piece("t", place), ...destination(place), ...(isReal ? [mark()] : [])];
    return entry(i + 1, name, value, {kind: isReal ? "real" : null, id: data.teacher[place][0]});
  });
  if (!data.draws) rows.push(restRow(row[2], data.step));
  if (rank < 0) {
    const note = make("small", {}, ` ◂ in the text, ${unseen()}`);
    rows.push(entry("", [piece("t", data.t[k]), note], real, {kind: "real", id: data.teacher[data.t[k]][0]}));
  }
  return pane("row", title, table(rows));
}

// The tokens of the chunk's own rows whose mass went to each token.
function takers(chunk) {
  const [from, to] = span(chunk, "t"), found = {};
  const used = data.merge === "first" ? [from] : data.merge === "last" ? [to - 1] : Array.from({length: to - from}, (_, i) => from + i);
  for (const k of used) {
    for (const place of data.rows?.[data.row[k]]?.[0] || []) {
      if (data.moved[place] >= 0) (found[data.moved[place]] ||= new Set()).add(place);
    }
  }
  return found;
}

// Entries with tokens; "from" says which tokens gave their mass to each.
function tokenRows(side, places, gaps, from = {}, real = null) {
  return entries(places, gaps, data.unit).map(([place, value], i) => {
    const given = [...(from[place] || [])], more = given.length > MOST_OTHERS ? ` and ${given.length - MOST_OTHERS} more` : "";
    const mark = given.length ? [make("small", {class: "moved"}, " takes ", ...list(given.slice(0, MOST_OTHERS), side), more)] : [];
    const known = (side === "t" ? data.teacher : data.student)[place][0];
    return entry(i + 1, [piece(side, place), ...mark], value, {kind: place === real ? "real" : null, id: known});
  });
}

// Probabilities that are compared as a sorted list, without tokens.
function unpaired(gaps, word = "other") {
  const found = entries([], gaps, data.unit).map(([, value]) => value);
  const rows = found.slice(0, MOST_OTHERS).map((value, i) => entry(i + 1, [make("small", {}, word)], value, {kind: "rest"}));
  const left = found.slice(MOST_OTHERS);
  if (left.length) {
    const mass = left.reduce((sum, value) => sum + Math.exp(-value), 0);
    rows.push(entry("", [make("small", {}, `${count(left.length, "more")} together`.replace("mores", "more"))], -Math.log(mass), {kind: "rest"}));
  }
  return rows;
}

function valueRow(label, value) {
  if (value === "?") return make("tr", {}, make("td"), make("td", {class: "name", colspan: 4}, make("small", {}, `not known: ${label}`)));
  return entry("", [make("small", {}, label)], value === null ? null : value * data.unit, {kind: "rest"});
}

function groupRow([place, size, value]) {
  const name = [make("small", {}, "child group from "), piece("s", place), make("small", {}, ` on, ${count(size, "token")}`)];
  return entry("", name, value * data.unit, {kind: "rest"});
}

// What a loss says of a place: its parts one after the other, each taking the values that it is made of.
function targetTable(name, values, from, real) {
  const {parts} = data.layout[name], kinds = parts.map(([kind]) => kind), rows = [], side = parts.find(([kind]) => kind === "tokens")?.[1];
  let next = 0;
  const take = () => values[next++];
  for (const [kind, word] of parts) {
    if (kind === "tokens") rows.push(...tokenRows(word, take(), take(), from, real));
    else if (kind === "list") rows.push(...unpaired(take(), side ? "other" : "kept entry"));
    else if (kind === "tail") rows.push(restRow(take(), data.unit));
    else if (kind === "groups") rows.push(...take().map(groupRow));
    else rows.push(valueRow(word, take()));
  }
  const one = `${side === "t" ? "teacher" : "student"} token`;
  return table(rows, side ? (kinds.includes("list") ? `paired ${one}` : one) : kinds.includes("list") ? "sorted list" : "likelihood of");
}

const likelihood = (chunk) => entry("", ["the chunk, as it stands in the text"], data.chunks[chunk][4] * data.unit);

// Lists of entries without an entry: the loss has no target there.
function empty(values) {
  const lists = values.filter(Array.isArray);
  return lists.length > 0 && !lists.some((one) => one.length);
}

function ofChunk(name, chunk) {
  const values = data.targets[name][targetOf(chunk)];
  if (empty(values)) return [make("p", {}, "no entries for this chunk")];
  const made = targetTable(name, values, data.layout[name].moved ? takers(chunk) : {}, null);
  // of values alone, the likelihood that all targets have is what they belong to
  if (data.layout[name].parts.every(([kind]) => kind === "value")) made.querySelector("tbody").prepend(likelihood(chunk));
  return [made];
}

function ofTokens(name, chunk) {
  const [from, to] = span(chunk, "s"), k = at.side === "s" ? at.k : from;
  if (from === to) return [make("p", {}, "no student token")];
  const choose = make("div", {class: "tabs"});
  for (let one = from; to - from > 1 && one < to; one++) {
    const button = make("button", {"aria-pressed": one === k}, piece("s", data.s[one]));
    button.addEventListener("click", () => { tab = name; show(chunk, "s", one); });
    choose.append(button);
  }
  const values = data.targets[name][k];
  if (empty(values)) return [choose, make("p", {}, "no target for ", piece("s", data.s[k]))];
  return [choose, targetTable(name, values, {}, data.s[k])];
}

// The loss that is shown: of a student token of its own says something a loss that is laid out by tokens.
const byTokens = (name) => data.layout[name]?.axis === "token";
const loss = () => {
  const chosen = tab === "row" ? losses[0] : tab;
  return at.side === "s" && !byTokens(chosen) ? losses.find(byTokens) ?? chosen : chosen;
};

// Which of the chunk's rows its target is made of.
const FROM = {first: "the row of its first token", last: "the row of its last token", mean: "the mean of its rows"};

function noTarget(chunk) {
  if (!data.spans) return "no row, so no target";
  return spanOf(chunk)[1] ? "no target: the student's text has nothing to compare here" : "not taught, so no target";
}

function targetPane(chunk) {
  const name = loss(), title = [make("span", {}, `${name} target`)];
  if (data.chunks[chunk][4] === null) return pane("target", [...title, make("small", {}, noTarget(chunk))]);
  const {axis, parts} = data.layout[name];
  if (axis === "chunk" && parts.some(([kind]) => kind !== "value")) title.push(make("small", {}, `of the chunk, from ${FROM[data.merge]}`));
  return pane("target", title, ...(axis === "token" ? ofTokens : ofChunk)(name, chunk));
}

function tabs() {
  const made = make("div", {class: "tabs"}), row = make("button", {class: "narrow", "aria-pressed": tab === "row"}, "row");
  row.addEventListener("click", () => choose("row"));
  made.append(row);
  for (const one of losses) {
    const button = make("button", {"data-loss": one, "aria-pressed": tab !== "row" && one === loss()}, one);
    button.addEventListener("click", () => choose(one));
    made.append(button);
  }
  return made;
}

function choose(name) {
  tab = name;
  if (at.side === "s" && !byTokens(name)) show(at.chunk);
  else drawDock();
}

function pane(name, title, ...inside) {
  const isShown = !losses.length || (tab === "row") === (name === "row");
  return make("div", {class: `pane ${name}${isShown ? " shown" : ""}`}, make("h3", {}, ...title), ...inside);
}

// "Chunk 3 of 12"; of a conversation's boxes only those with a target are chunks.
function numbered(box) {
  const word = data.s ? "Chunk" : "Token", own = data.s ? data.chunks.filter((_, i) => targetOf(i) >= 0) : data.chunks;
  const number = own.indexOf(data.chunks[box]) + 1;
  return number ? `${word} ${number.toLocaleString("en")} of ${own.length.toLocaleString("en")}` : "In no chunk";
}

function about(chunk) {
  const [, , , size, value] = data.chunks[chunk], start = data.chunks.slice(0, chunk).reduce((sum, one) => sum + one[3], 0);
  const said = [make("b", {}, numbered(chunk))];
  if (data.spans) said.push(`, ${spanOf(chunk)[0]}`);
  said.push(size ? `, bytes ${start.toLocaleString("en")} to ${(start + size).toLocaleString("en")}` : ", no bytes");
  if (value !== null) said.push(`, ${nats(value * data.unit)} nats, ${(value * data.unit * BITS).toFixed(2)} bits`);
  if (held) said.push(" ", make("span", {class: "held"}, "held, Esc lets go"));
  return make("p", {}, ...said);
}

function drawDock() {
  dock.classList.toggle("empty", !at);
  if (!at) return dock.replaceChildren(make("p", {}, "Point at a token to see its row."));
  const k = at.side === "t" ? at.k : span(at.chunk, "t")[0], parts = [rowPane(k)];
  if (losses.length) parts.push(targetPane(at.chunk));
  const head = make("div", {class: "head"}, about(at.chunk), ...(losses.length ? [tabs()] : []));
  dock.replaceChildren(head, make("div", {class: losses.length ? "panes" : "panes single"}, ...parts));
  drawBars();
}

// One scale for both tables: their longest bar. The tail mass has none, it would be the longest of all.
function drawBars() {
  const bars = [...dock.querySelectorAll("b[data-p]")], most = Math.max(...bars.map((bar) => Number(bar.dataset.p)), 1e-12);
  for (const bar of bars) bar.style.width = `${(100 * bar.dataset.p) / most}%`;
  for (const bar of dock.querySelectorAll("td.bar b:not([data-p])")) bar.remove();
  for (const head of dock.querySelectorAll("th.bar")) head.textContent = `0 to ${percent(most)}`;
}
