// The page: a chat, and beside it each round as it happened. It draws what view/rounds.py tells, from the server that it came from or from
// a recording; it loads nothing else.

const FORM = 1; // of recordings; recording.py knows it too
const WINDOW = 20; // rounds of the running tau
const SPEED = 8; // rounds over which tokens a second are counted
const STROKES = 5;
const PACES = { strokes: 900, second: 1000 / STROKES, fast: 200 / STROKES };

const state = {
  about: {}, // what wrote the texts
  turns: [], // { request, choice, prompt, answer, draft, rounds, mine, seed, ended, view }
  all: [], // every round there is: { turn, event }
  at: -1, // the one that is shown
  follow: true, // whether a new round is shown as it comes
  stroke: STROKES, // strokes of it that are lit
  timer: 0,
  asking: null, // an AbortController while an answer comes
  watching: null, // the same of a watch of all requests
};

const $ = (id) => document.getElementById(id);

function add(node, attributes, parts) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...parts.flat().filter((part) => part !== null && part !== undefined && part !== ""));
  return node;
}
const h = (tag, attributes, ...parts) => add(document.createElement(tag), attributes, parts);
const s = (tag, attributes, ...parts) => add(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, parts);

// ---- words ----

const shown = (text) => (text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·"));
const short = (text, most = 12) => {
  const whole = shown(text);
  return whole.length > most ? whole.slice(0, most - 1) + "…" : whole;
};
const quoted = (text) => `“${shown(text)}”`;
const some = (count, one, more = one + "s") => `${count} ${count === 1 ? one : more}`;
const ms = (number) => `${number < 10 ? number.toFixed(1) : Math.round(number)} ms`;
const sum = (numbers) => numbers.reduce((total, each) => total + each, 0);
const reads = (event) => event.nodes.length > 1;
const sampled = (event) => event.temperature > 0;
const eagle = () => (state.about.method ?? "").startsWith("eagle3");
const own = (event, row) => {
  // a node's chance, given its parent
  const [, , parent, , chance] = event.nodes[row];
  return parent < 0 ? 1 : Math.min(1, chance / Math.max(event.nodes[parent][4], 1e-9));
};

const GUESSED = { draft: "guessed by the draft", copy: "copied", form: "forced by the answer's form" };

// ---- rounds come in ----

const keyed = (request, choice) => `${request}/${choice}`;

function turnOf(event) {
  let turn = state.turns.find((each) => keyed(each.request, each.choice) === keyed(event.request, event.choice));
  if (!turn) turn = newTurn({ request: event.request, choice: event.choice, prompt: "", mine: false });
  return turn;
}

function newTurn(given) {
  const turn = { request: "", choice: 0, prompt: "", answer: "", rounds: [], mine: true, ...given };
  const answer = h("p", { class: "answer" });
  const prompt = turn.prompt || (turn.mine ? "" : `another request, ${turn.request}`);
  const named = turn.draft && h("p", { class: "note" }, `draft ${turn.draft}`);
  turn.view = h("div", { class: "turn" }, prompt && h("p", { class: "prompt" }, prompt), named, answer);
  turn.text = answer;
  state.turns.push(turn);
  $("turns").append(turn.view);
  return turn;
}

function hear(event) {
  const turn = turnOf(event);
  const last = turn.rounds.at(-1);
  if (last && event.n <= last.n) return;
  if (!last) turn.text.replaceChildren(token(event.root.text, "bonus", "drawn by the target once the prompt was read"));
  const missed = event.n - 1 - (last?.n ?? 0);
  if (missed) turn.text.append(h("span", { class: "lost" }, ` [${some(missed, "round")} not seen] `));
  turn.rounds.push(event);
  const index = state.all.push({ turn, event }) - 1;
  turn.text.append(bracket(event, index));
  if (state.follow && !state.timer) soon(() => show(state.all.length - 1));
  else soon(() => show(state.at < 0 ? 0 : state.at));
}

let waiting = null;
function soon(what) {
  // the latest of many, once a frame
  if (!waiting)
    requestAnimationFrame(() => {
      const last = waiting;
      waiting = null;
      last();
    });
  waiting = what;
}

function token(text, kind, title) {
  const special = /^<\|?[^<>]+\|?>$/.test(text);
  return h("span", { class: `token ${kind}${special ? " special" : ""}`, title }, text);
}

function bracket(event, index) {
  const parts = event.committed.map(([, text], place) => {
    const row = event.path[place + 1];
    if (row === undefined) return token(text, "bonus", `${quoted(text)}: drawn by the target, the bonus of round ${event.n}`);
    const by = event.nodes[row][5],
      chance = own(event, row);
    const sure = `s${Math.min(3, Math.floor(chance * 4))}`;
    return token(text, `${by} ${sure}`, `${quoted(text)}: ${GUESSED[by]}, with ${chance.toFixed(2)}, and drawn`);
  });
  const group = h("span", { class: "round", "data-index": String(index) }, parts);
  group.addEventListener("click", () => {
    pause();
    show(index);
  });
  return group;
}

// ---- the round that is shown ----

function show(index, stroke = STROKES) {
  if (!state.all.length) return empty();
  state.at = Math.max(0, Math.min(index, state.all.length - 1));
  state.follow = state.at === state.all.length - 1;
  state.stroke = stroke;
  const { event } = state.all[state.at];
  const slider = $("slider");
  slider.max = String(state.all.length - 1);
  slider.value = String(state.at);
  slider.setAttribute("aria-valuetext", `round ${state.at + 1} of ${state.all.length}`);
  slider.disabled = false;
  $("play").disabled = $("save").disabled = false;
  $("before").disabled = state.at === 0;
  $("after").disabled = state.at === state.all.length - 1;
  const what = event.committed.length === 1 ? "one token" : `${event.committed.length} tokens`;
  $("where").textContent =
    `${state.at + 1} of ${state.all.length}: ${what} behind ${quoted(event.root.text)}, at position ${event.root.pos}`;
  for (const group of document.querySelectorAll(".turn .round.shown")) group.classList.remove("shown");
  const group = document.querySelector(`.turn .round[data-index="${state.at}"]`);
  group?.classList.add("shown");
  if (group) within($("turns"), group);
  [features, growthOfAll, pass, walk, keep].forEach((draw, number) => {
    const [words, figure] = draw(event);
    const item = $("strokes").children[number];
    item.querySelector("p").textContent = words;
    item.querySelector(".figure").replaceChildren(...(figure ? [figure].flat() : []));
  });
  const strip = $("strokes").querySelector(".figure");
  strip.scrollLeft = strip.scrollWidth; // the last token is what it is about
  light();
  figures();
  overTime();
}

function within(box, part) {
  // scroll a box, and never the page
  const [outer, inner] = [box.getBoundingClientRect(), part.getBoundingClientRect()];
  if (inner.bottom > outer.bottom) box.scrollTop += inner.bottom - outer.bottom + 8;
  else if (inner.top < outer.top) box.scrollTop -= outer.top - inner.top + 8;
}

function light() {
  [...$("strokes").children].forEach((item, number) => {
    item.classList.toggle("later", number >= state.stroke);
    item.classList.toggle("now", Boolean(state.timer) && number === state.stroke - 1);
  });
}

function empty() {
  for (const id of ["slider", "play", "before", "after", "save"]) $(id).disabled = true;
  $("where").textContent = "No round yet: send a message, or open a recording.";
  state.at = -1;
  for (const item of $("strokes").children) {
    item.querySelector("p").textContent = "";
    item.querySelector(".figure").replaceChildren();
  }
  figures();
  overTime();
}

// 1
function features(event) {
  const root = quoted(event.root.text);
  if (!eagle()) return [`The target has read the text up to ${root}, which it drew and has not read yet.`, strip(event, false)];
  const words =
    `Every token that the target has read left three of its states, low l, middle m and high h; the draft's fc fuses them into ` +
    `one feature g. ${root} was drawn, not read: it has no g yet.`;
  return [words, strip(event, true)];
}

function strip(event, fused) {
  const one = (text, unread) =>
    h(
      "div",
      { class: `feature${unread ? " unread" : ""}` },
      h("span", { class: `chip${unread ? " root" : ""}` }, short(text)),
      fused &&
        h(
          "span",
          { class: "lmh" },
          ["l", "m", "h"].map((letter) => h("i", {}, letter)),
        ),
      fused && h("span", { class: "fc" }, unread ? " " : "↓ fc"),
      fused && h("span", { class: `chip ${unread ? "none" : "g"}` }, unread ? "no g" : "g"),
    );
  return h(
    "div",
    { class: "features" },
    event.before.map(([, text]) => one(text, false)),
    one(event.root.text, true),
  );
}

// 2
function growth(event) {
  if (!reads(event)) return ["Nothing is guessed in this round: it is plain decoding, one row for one token.", null];
  const guesses = event.nodes.slice(1),
    of = (kind) => guesses.filter((node) => node[5] === kind).length;
  const copied = of("copy"),
    forced = of("form");
  const depth = Math.max(...guesses.map((node) => node[3]));
  const last = event.before.at(-1);
  const given = sampled(event) ? ", given the noise that the target will draw with" : "";
  const chances = `A node's bar and number: the chance that the text goes down to it${given}.`;
  const both =
    (copied ? ` ${some(copied, "guess was", "guesses were")} copied: the tokens before stood earlier in the text.` : "") +
    (forced ? ` ${some(forced, "guess was", "guesses were")} forced by the answer's form.` : "");
  if (copied + forced === guesses.length) return [`None of the guesses is the draft's.${both} ${chances}`, tree(event, false)];
  let words = "The draft guesses level by level; the best nodes of each level are expanded, and the best of all are kept.";
  if (eagle()) {
    words =
      `Level 1: the draft reads g${last ? ` of ${quoted(last[1])}` : ""} with the token ${quoted(event.root.text)}; ` +
      "its output is a, and its head guesses what follows.";
    if (depth > 1)
      words += " From level 2 on there is no g, for the target has read none of these tokens: the draft's own a stands in for it.";
  }
  const more = event.left_out ?? 0;
  const cut = more
    ? ` Then ${guesses.length} ${guesses.length === 1 ? "is" : "are"} kept for the pass; ${some(more, "other was", "others were")} left out` +
      `${event.cut.length ? (event.cut.length < more ? ", the likeliest of which are hollow." : ", hollow here.") : "."}`
    : "";
  return [`${words}${cut}${both} ${chances}`, tree(event, true)];
}

function growthOfAll(event) {
  // of a recording of two drafts: the other's tree behind the same token too
  const [words, figure] = growth(event);
  const { turn } = state.all[state.at];
  if (!turn.draft || !figure) return [words, figure];
  const place = (each) => each.root.pos === event.root.pos;
  const others = state.turns.filter((each) => each !== turn && each.draft);
  const lines = others.map((other) => {
    const theirs = other.rounds.find(place);
    const mark = h("p", { class: "note" }, `draft ${other.draft}${theirs ? "" : ": this token lies within a round of its"}`);
    return [mark, theirs && reads(theirs) ? alone(tree(theirs, true)) : null];
  });
  return [words, [h("p", { class: "note" }, `draft ${turn.draft}`), figure, ...lines.flat().filter(Boolean)]];
}

function alone(drawing) {
  // its rows are not those of the mask
  for (const each of drawing.querySelectorAll("[data-row]")) each.removeAttribute("data-row");
  return drawing;
}

function tree(event, drafted) {
  const W = 106,
    H = 32,
    GAP = 32,
    ROW = event.drawn?.length ? 42 : 30,
    TOP = 26;
  const grown = [...event.nodes, ...(event.cut ?? [])]; // rows of the pass, then guesses that were left out of it
  const hollow = (row) => row >= event.nodes.length && row < grown.length;
  const taken = new Set(event.path),
    end = event.path.at(-1),
    bonus = grown.length; // the bonus: one node more
  const bonusDepth = event.nodes[end][3] + 1,
    cut = event.committed.length < event.path.length;
  const kids = grown.map(() => []);
  grown.forEach(([, , parent], row) => {
    if (parent >= 0) kids[parent].push(row);
  });
  kids.push([]);
  if (!cut) kids[end].push(bonus);
  const right = (row) => row === bonus || taken.has(row);
  for (const line of kids) line.sort((one, other) => right(other) - right(one) || hollow(one) - hollow(other)); // the walk along the top
  const y = [];
  let leaves = 0;
  const place = (row) => {
    kids[row].forEach(place);
    y[row] = kids[row].length ? y[kids[row][0]] : leaves++;
  };
  place(0);
  const depth = Math.max(...grown.map((node) => node[3]), cut ? 0 : bonusDepth);
  const px = (level) => 1 + level * (W + GAP),
    py = (line) => TOP + line * ROW;
  const width = px(depth) + W + 2,
    height = py(leaves) + 2;
  const drawing = s("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": treeWords(event) });
  for (let level = 0; level <= depth; level++) {
    const head = level === 0 ? "the last token" : `level ${level}`;
    drawing.append(s("text", { x: px(level) + (level && drafted && eagle() ? 18 : 0), y: 12, class: "soft" }, head));
    if (level && drafted && eagle()) {
      drawing.append(
        s("rect", { x: px(level), y: 1, width: 14, height: 14, rx: 3, class: level === 1 ? "head-g" : "head-a" }),
        s("text", { x: px(level) + 7, y: 12, "text-anchor": "middle", class: "soft" }, level === 1 ? "g" : "a"),
      );
    }
  }
  const edge = (from, to, levels, kind) => {
    const middle = H / 2 - 6;
    const [x1, y1, x2, y2] = [px(levels[0]) + W, py(from) + middle, px(levels[1]), py(to) + middle];
    return s("path", { class: `edge${kind}`, d: `M${x1} ${y1}C${x1 + GAP / 2} ${y1} ${x2 - GAP / 2} ${y2} ${x2} ${y2}` });
  };
  grown.forEach(([, , parent, level], row) => {
    if (parent >= 0 && !taken.has(row)) drawing.append(edge(y[parent], y[row], [level - 1, level], hollow(row) ? " hollow" : ""));
  });
  event.nodes.forEach(([, , parent, level], row) => {
    if (parent >= 0 && taken.has(row)) drawing.append(edge(y[parent], y[row], [level - 1, level], " taken"));
  });
  grown.forEach(([, text, parent, level, chance, by], row) => {
    const kind = `node ${parent < 0 ? "root" : by}${taken.has(row) ? " taken" : hollow(row) ? " hollow" : ""}`;
    const told =
      parent < 0
        ? quoted(text)
        : hollow(row)
          ? `${quoted(text)}, ${GUESSED[by]}: ${chance.toFixed(3)}; left out of the pass`
          : `${quoted(text)}, ${GUESSED[by]}: ${chance.toFixed(3)}; ${own(event, row).toFixed(3)} given what is before it`;
    const group = s(
      "g",
      { class: kind, "data-row": hollow(row) ? undefined : String(row), transform: `translate(${px(level)} ${py(y[row])})` },
      s("title", {}, told),
      s("rect", { class: "box", width: W, height: H - 12, rx: 4 }),
      s("text", { x: 6, y: 15.5 }, short(text, parent < 0 ? 12 : 8)),
    );
    const drawn = event.drawn?.[row];
    if (drawn) group.append(s("text", { x: 6, y: H + 2, class: "soft drawn" }, `draws ${short(drawn[1], 11)}`));
    if (parent >= 0) {
      group.append(
        s("text", { x: W - 5, y: 15.5, "text-anchor": "end", class: "soft" }, chance < 0.005 ? "<.01" : chance.toFixed(2)),
        s("rect", { class: "chance", x: 1, y: H - 11, width: Math.max(1, (W - 2) * chance), height: 3, rx: 1.5 }),
      );
    }
    drawing.append(group);
  });
  if (!cut) {
    drawing.append(
      edge(y[end], y[bonus], [bonusDepth - 1, bonusDepth], " out"),
      s(
        "g",
        { class: "node bonus", transform: `translate(${px(bonusDepth)} ${py(y[bonus])})` },
        s("title", {}, `${quoted(event.bonus[1])}: drawn by the target, in no guess`),
        s("rect", { class: "box", width: W, height: H - 12, rx: 4 }),
        s("text", { x: 6, y: 15.5 }, short(event.bonus[1])),
      ),
    );
  }
  drawing.addEventListener("pointerover", (over) => lit(over.target.closest?.("[data-row]")?.dataset.row));
  drawing.addEventListener("pointerleave", () => lit());
  return drawing;
}

function treeWords(event) {
  const kept = event.path
    .slice(1)
    .map((row) => quoted(event.nodes[row][1]))
    .join(" ");
  const right = kept ? `Right were ${kept}.` : "None was right.";
  return `A tree of ${some(event.nodes.length - 1, "guess", "guesses")} behind ${quoted(event.root.text)}. ${right}`;
}

function lit(row) {
  for (const each of document.querySelectorAll(".lit")) each.classList.remove("lit");
  if (row === undefined) return;
  for (const each of document.querySelectorAll(`#strokes [data-row="${row}"]`)) each.classList.add("lit");
}

// 3
function pass(event) {
  const rows = some(event.rows, "row"),
    many = event.sequences > 1;
  const took = `${ms(event.ms.pass)}${many ? `, shared by ${event.sequences} texts` : ""}`;
  if (!reads(event)) return [`The target reads ${rows} in one pass (${took}).`, null];
  const draft = event.ms.draft >= 0.05 ? ` Growing the ${many ? "trees" : "tree"} took ${ms(event.ms.draft)}.` : "";
  return [
    `The target reads all ${rows} in one pass (${took}). A row sees the text before the tree, ` +
      `and of the tree its ancestors and itself.${draft}`,
    matrix(event),
  ];
}

function matrix(event) {
  const count = event.nodes.length,
    size = Math.max(4, Math.min(16, Math.floor(300 / count))),
    left = size >= 11 ? 96 : 0;
  const sees = event.nodes.map((_, row) => {
    const line = new Set();
    for (let each = row; each >= 0; each = event.nodes[each][2]) line.add(each);
    return line;
  });
  const width = left + count * size + 1,
    height = count * size + 1;
  const drawing = s("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `The mask of ${count} rows: each sees its ancestors and itself`,
  });
  event.nodes.forEach(([, text], row) => {
    const line = s(
      "g",
      { class: "row", "data-row": String(row) },
      s(
        "title",
        {},
        `row ${row}, ${quoted(text)}, sees ${[...sees[row]]
          .reverse()
          .map((each) => quoted(event.nodes[each][1]))
          .join(" ")}`,
      ),
    );
    if (left) line.append(s("text", { x: left - 6, y: (row + 0.5) * size + 4, "text-anchor": "end", class: "soft" }, short(text)));
    for (let column = 0; column < count; column++) {
      line.append(
        s("rect", {
          class: `cell${sees[row].has(column) ? " sees" : ""}`,
          x: left + column * size,
          y: row * size,
          width: size - 1,
          height: size - 1,
        }),
      );
    }
    drawing.append(line);
  });
  drawing.addEventListener("pointerover", (over) => lit(over.target.closest?.("[data-row]")?.dataset.row));
  drawing.addEventListener("pointerleave", () => lit());
  return h(
    "div",
    { class: "matrix" },
    drawing,
    h("p", { class: "note" }, "A line is a row of the pass, a column the row that it may see."),
  );
}

// 4
function walk(event) {
  const law = sampled(event)
    ? "the token with the highest log chance + noise, where the noise is settled by seed and position alone"
    : "its likeliest token";
  const words =
    `At each row it reaches the target draws a token of its own: ${law}. A child that holds it is where the walk goes on; the first ` +
    `draw that no child holds is the bonus token, and ends it. So no guess can change the text.` +
    (sampled(event) && reads(event)
      ? " The draft ranks its guesses with the very same noise, so it guesses what will be drawn, not what is likely: that is why " +
        "guesses stay right when text is sampled."
      : "");
  return [
    words,
    event.draws.length
      ? h(
          "div",
          { class: "draws" },
          event.draws.map((draw, place) => drawn(event, draw, place)),
        )
      : null,
  ];
}

function drawn(event, draw, place) {
  const row = event.path[place],
    last = place === event.path.length - 1,
    noisy = sampled(event);
  const best = Math.max(...draw.map(([, , chance]) => chance), 1e-9);
  const lines = draw.map(([, text, chance, noise], rank) => {
    const cells = noisy ? summed(chance, noise) : [small(chance), bar(chance / best)];
    return line(text, cells, rank ? "" : "drawn");
  });
  const head = noisy ? ["", "chance", "log", "noise", "sum"] : ["", "chance", ""];
  const verdict = last ? (event.nodes.length > 1 ? "in no child: the bonus token" : "the round's one token") : "a child holds it: on";
  return h(
    "div",
    { class: `draw${last ? " last" : ""}` },
    list(`the target, behind ${quoted(event.nodes[row][1])}`, head, lines),
    h("p", { class: "verdict" }, verdict),
    guesses(event, draw, place),
  );
}

function guesses(event, draw, place) {
  // the draft's guesses at a row of the walk, with the noise that the target drew with
  const beside = (event.beside?.[place] ?? []).slice(0, 5);
  if (!beside.length) return null;
  const noisy = sampled(event);
  const lines = beside.map(([row, chance, noise]) => {
    const [token, text] = event.nodes[row],
      mine = own(event, row);
    const log = Math.log(Math.max(mine, 1e-12)) - noise;
    const cells = noisy ? [small(mine), signed(log), signed(noise), signed(log + noise)] : [small(mine), small(chance)];
    return line(text, cells, token === draw[0][0] ? "drawn" : "");
  });
  const head = noisy ? ["", "chance, given the noise", "log q + c", "noise", "sum"] : ["", "draft", "target"];
  return list(noisy ? "the guesses, with the same noise" : "the guesses", head, lines);
}

function list(caption, head, lines) {
  const cells = head.map((each) => (each ? h("th", { scope: "col" }, each) : h("td", {})));
  return h("table", {}, h("caption", {}, caption), h("thead", {}, h("tr", {}, cells)), h("tbody", {}, lines));
}

function line(text, cells, kind) {
  return h(
    "tr",
    { class: kind },
    h("td", {}, short(text, 14)),
    cells.map((each) => h("td", {}, each)),
  );
}

function bar(share) {
  const part = h("span", { class: "bar" });
  part.style.width = `${Math.round(56 * share)}px`;
  return part;
}

const small = (chance) => (chance < 0.0001 ? "<0.0001" : chance.toFixed(chance < 0.01 ? 4 : 2));
const summed = (chance, noise) => [small(chance), signed(Math.log(chance)), signed(noise), signed(Math.log(chance) + noise)];
const signed = (number) => (number < 0 ? "−" : "") + Math.abs(number).toFixed(2);

// 5
function keep(event) {
  const kept = event.path.length,
    gone = event.rows - kept,
    guesses = Math.min(kept - 1, event.committed.length);
  const cut = event.committed.length < kept;
  const parts = [guesses && some(guesses, "guess", "guesses"), !cut && "the bonus token"].filter(Boolean).join(" and ");
  let words = `The text grows by ${some(event.committed.length, "token")}: ${parts}. `;
  if (event.end) words += `It ends here (${event.end}).`;
  else {
    const lost = gone ? ` and ${gone} ${gone === 1 ? "goes" : "go"}` : "";
    words += `In the cache ${some(kept, "row")} of the pass stay${kept === 1 ? "s" : ""}${lost}; `;
    words += eagle()
      ? "the pass has made l, m and h of what stayed, so its g exists now. The bonus token is the next root."
      : "the bonus token is the next root.";
  }
  const path = new Set(event.path);
  const chip = ([, text, parent, , , by], row) =>
    h("span", { class: `chip ${parent < 0 ? "root" : path.has(row) ? by : "gone"}`, title: quoted(text) }, short(text));
  const lines = [
    h(
      "div",
      { class: "chips" },
      h("span", {}, "rows that stay"),
      event.nodes.map((node, row) => (path.has(row) ? chip(node, row) : null)),
      !cut && h("span", { class: "chip bonus" }, short(event.bonus[1])),
      !cut && h("span", { class: "note" }, "drawn, not read"),
    ),
  ];
  if (gone)
    lines.push(
      h(
        "div",
        { class: "chips" },
        h("span", {}, "rows that go"),
        event.nodes.map((node, row) => (path.has(row) ? null : chip(node, row))).slice(0, 24),
        gone > 24 ? h("span", { class: "note" }, `and ${gone - 24} more`) : null,
      ),
    );
  if (eagle() && !event.end)
    lines.push(
      h(
        "div",
        { class: "chips" },
        h("span", {}, "new features"),
        event.path.map((row) => h("span", { class: "chip g" }, `g ${short(event.nodes[row][1])}`)),
        h("span", { class: "chip none" }, `no g ${short(event.bonus[1])}`),
      ),
    );
  return [words, lines];
}

// ---- over time ----

const committed = (index) => state.all[index].event.committed.length;

function tau(index) {
  const first = Math.max(0, index - WINDOW + 1);
  return sum(Array.from({ length: index - first + 1 }, (_, each) => committed(first + each))) / (index - first + 1);
}

function speed(index) {
  // tokens a second of a text over its last rounds
  const { turn, event } = state.all[index];
  const place = turn.rounds.indexOf(event),
    first = Math.max(0, place - SPEED + 1);
  const since = first ? turn.rounds[first - 1].ms.at : event.ms.first;
  const tokens = sum(turn.rounds.slice(first, place + 1).map((each) => each.committed.length));
  return event.ms.at > since ? (1000 * tokens) / (event.ms.at - since) : 0;
}

function figures() {
  const any = state.at >= 0;
  $("tau").textContent = any ? tau(state.at).toFixed(2) : "–";
  $("speed").textContent = any ? speed(state.at).toFixed(0) : "–";
  $("count").textContent = String(state.all.length);
  $("tokens").textContent = String(sum(state.all.map(({ event }) => event.committed.length)));
}

function overTime() {
  const count = state.all.length,
    first = Math.max(0, Math.min(state.at - 60, count - 120)),
    last = Math.min(count, first + 120);
  const indices = Array.from({ length: last - first }, (_, each) => first + each);
  const told = count ? `tau ${tau(state.at).toFixed(2)} at round ${state.at + 1}` : "nothing yet";
  $("steps").replaceChildren(plot(indices, committed, tau, told));
  $("speeds").replaceChildren(
    plot(indices, null, speed, count ? `${speed(state.at).toFixed(0)} tokens a second at round ${state.at + 1}` : "nothing yet"),
  );
  $("times").replaceChildren(...times(indices));
  $("lanes").replaceChildren(...lanes());
  const counts = new Map();
  for (const { event } of state.all) counts.set(event.committed.length, (counts.get(event.committed.length) ?? 0) + 1);
  $("lengths").replaceChildren(lengths(counts));
}

function plot(indices, bars, line, words) {
  const W = 480,
    H = 96,
    LEFT = 26,
    BASE = H - 4;
  const drawing = s("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": words });
  const most = Math.max(1, ...indices.map((index) => Math.max(bars ? bars(index) : 0, line(index)))) * 1.08;
  const step = (W - LEFT) / Math.max(indices.length, 24),
    x = (place) => LEFT + place * step,
    y = (value) => BASE - ((BASE - 6) * value) / most;
  const marks = most < 20 ? [1, Math.floor(most)] : [Math.floor(most / 2), Math.floor(most)];
  for (const mark of new Set(marks)) {
    drawing.append(
      s("line", { class: "axis", x1: LEFT, x2: W, y1: y(mark), y2: y(mark) }),
      s("text", { class: "soft", x: LEFT - 4, y: y(mark) + 4, "text-anchor": "end" }, String(mark)),
    );
  }
  indices.forEach((index, place) => {
    if (bars)
      drawing.append(
        s("rect", {
          class: `bar${bars(index) === 1 ? " one" : ""}`,
          x: x(place) + step * 0.1,
          width: step * 0.8,
          y: y(bars(index)),
          height: BASE - y(bars(index)),
        }),
      );
    if (index === state.at) drawing.append(s("rect", { class: "here", x: x(place), width: step, y: 2, height: BASE - 1 }));
  });
  if (indices.length)
    drawing.append(
      s("polyline", { class: "line", points: indices.map((index, place) => `${x(place) + step / 2},${y(line(index))}`).join(" ") }),
    );
  return drawing;
}

function spent(index) {
  // a round's milliseconds: the draft's, the pass's, all else; all else is not known of a text's first round
  const { turn, event } = state.all[index];
  const before = turn.rounds[turn.rounds.indexOf(event) - 1];
  const whole = before && before.n === event.n - 1 ? event.ms.at - before.ms.at : event.ms.draft + event.ms.pass;
  return [event.ms.draft, event.ms.pass, Math.max(0, whole - event.ms.draft - event.ms.pass)];
}

function times(indices) {
  const W = 480,
    H = 110,
    LEFT = 34,
    BASE = H - 4;
  const parts = indices.map(spent),
    plain = indices.map((index) => state.all[index].event.ms.plain ?? null);
  const most = Math.max(1, ...parts.map(sum), ...plain.map((each) => each ?? 0)) * 1.05;
  const step = (W - LEFT) / Math.max(indices.length, 24),
    height = (value) => ((BASE - 4) * value) / most;
  const now = state.at >= 0 ? spent(state.at) : null,
    price = state.at >= 0 ? state.all[state.at].event.ms.plain : null;
  const words = now
    ? `round ${state.at + 1}: draft ${ms(now[0])}, pass ${ms(now[1])}, rest ${ms(now[2])}` +
      (price ? `; a plain pass, for one token, takes ${ms(price)}` : "")
    : "nothing yet";
  const drawing = s("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": words });
  const mark = Math.floor(most / 1.05);
  drawing.append(
    s("line", { class: "axis", x1: LEFT, x2: W, y1: BASE - height(mark), y2: BASE - height(mark) }),
    s("text", { class: "soft", x: LEFT - 4, y: BASE - height(mark) + 4, "text-anchor": "end" }, String(mark)),
  );
  indices.forEach((index, place) => {
    let top = BASE;
    parts[place].forEach((part, kind) => {
      top -= height(part);
      const box = { x: LEFT + place * step + step * 0.1, width: step * 0.8, y: top, height: height(part) };
      drawing.append(s("rect", { class: ["head-a", "head-g", "rest"][kind], ...box }));
    });
    if (plain[place] !== null) {
      const y = BASE - height(plain[place]);
      drawing.append(s("line", { class: "line", x1: LEFT + place * step, x2: LEFT + (place + 1) * step, y1: y, y2: y }));
    }
    if (index === state.at) drawing.append(s("rect", { class: "here", x: LEFT + place * step, width: step, y: 2, height: BASE - 1 }));
  });
  return [drawing, h("p", { class: "note" }, `${words}.`)];
}

function lanes() {
  // a line for each slot: a text waits and reads, then ticks as its rounds end, taller for more tokens
  const texts = state.turns.filter((turn) => turn.rounds.length && turn.rounds[0].ms.end !== undefined);
  const begun = (turn) => turn.rounds[0].ms.end - turn.rounds[0].ms.at,
    ended = (turn) => turn.rounds.at(-1).ms.end;
  const last = Math.max(0, ...texts.map(ended)),
    first = Math.max(last - 30000, Math.min(last, ...texts.map(begun)));
  const slots = [...new Set(texts.map((turn) => turn.rounds[0].slot ?? 0))].sort((a, b) => a - b);
  const W = 480,
    ROW = 26,
    LEFT = 34,
    H = Math.max(1, slots.length) * ROW + 4;
  const x = (time) => LEFT + ((W - LEFT - 2) * (Math.max(time, first) - first)) / Math.max(last - first, 1);
  const words = texts.length ? `${some(texts.length, "text")} in ${some(slots.length, "slot")}` : "nothing yet";
  const drawing = s("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": words });
  slots.forEach((slot, place) => {
    const base = (place + 1) * ROW;
    drawing.append(
      s("text", { class: "soft", x: LEFT - 6, y: base - 4, "text-anchor": "end" }, String(slot)),
      s("line", { class: "axis", x1: LEFT, x2: W, y1: base, y2: base }),
    );
    for (const turn of texts.filter((each) => (each.rounds[0].slot ?? 0) === slot && ended(each) >= first)) {
      const reading = begun(turn),
        written = reading + turn.rounds[0].ms.first;
      drawing.append(
        s("rect", { class: "reading", x: x(reading), y: base - 9, width: Math.max(1, x(written) - x(reading)), height: 8 }),
      );
      for (const event of turn.rounds) {
        if (event.ms.end < first) continue;
        const height = Math.min(22, 4 + 4 * event.committed.length);
        drawing.append(s("line", { class: "tick", x1: x(event.ms.end), x2: x(event.ms.end), y1: base, y2: base - height }));
      }
    }
  });
  return [drawing, h("p", { class: "note" }, `${words}${last > first ? `, ${((last - first) / 1000).toFixed(1)} seconds` : ""}.`)];
}

function lengths(counts) {
  const most = Math.max(1, ...counts.values()),
    longest = Math.max(1, ...counts.keys()),
    W = 480,
    ROW = 18,
    LEFT = 26;
  const H = longest * ROW + 2,
    words = [...counts]
      .sort((a, b) => a[0] - b[0])
      .map(([length, count]) => `${some(count, "round")} of ${some(length, "token")}`)
      .join(", ");
  const drawing = s("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": words || "nothing yet" });
  for (let length = 1; length <= longest && counts.size; length++) {
    const count = counts.get(length) ?? 0,
      width = ((W - LEFT - 40) * count) / most;
    drawing.append(
      s("text", { class: "soft", x: LEFT - 4, y: length * ROW - 4, "text-anchor": "end" }, String(length)),
      s("rect", { class: `bar${length === 1 ? " one" : ""}`, x: LEFT, y: (length - 1) * ROW + 3, width, height: ROW - 6 }),
      s("text", { class: "soft", x: LEFT + width + 5, y: length * ROW - 4 }, String(count)),
    );
  }
  return drawing;
}

// ---- playing ----

function pause() {
  clearTimeout(state.timer);
  state.timer = 0;
  $("play").textContent = "Play";
  if (state.at >= 0) {
    state.stroke = STROKES;
    light();
  }
}

function play() {
  if (state.timer) return pause();
  if (!state.all.length) return undefined;
  $("play").textContent = "Pause";
  const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const tick = (index, stroke) => {
    const pace = PACES[$("pace").value];
    state.timer = setTimeout(
      () => {
        if (stroke < STROKES && !calm) {
          state.stroke = stroke + 1;
          light();
          return tick(index, stroke + 1);
        }
        if (index + 1 >= state.all.length && !state.asking) return pause();
        const next = Math.min(index + 1, state.all.length - 1);
        show(next, calm || next === index ? STROKES : 1);
        return tick(next, state.stroke);
      },
      calm ? pace * STROKES : pace,
    );
  };
  show(state.at === state.all.length - 1 ? 0 : state.at, calm ? STROKES : 1);
  tick(state.at, state.stroke);
  light();
}

// ---- asking ----

function headers(more) {
  const key = $("key").value;
  return { ...more, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function say(words, wrong = false) {
  $("status").textContent = words;
  $("status").classList.toggle("wrong", wrong);
}

async function refusal(response) {
  if (response.status === 401) {
    $("key-label").hidden = false;
    $("key").focus();
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status}`;
  }
}

async function* events(response) {
  // server-sent events: [name, data as text]
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const field = (name) =>
        part
          .split("\n")
          .filter((line) => line.startsWith(`${name}: `))
          .map((line) => line.slice(name.length + 2))
          .join("\n");
      if (field("data")) yield [field("event"), field("data")];
    }
  }
}

async function watch(request, signal) {
  // resolves once the server watches; the rounds come in by themselves
  const draws = $("everywhere").checked ? "&draws=all" : "";
  const response = await fetch(`v1/eyas/rounds?request=${encodeURIComponent(request)}${draws}`, { headers: headers(), signal });
  if (!response.ok) throw new Error(await refusal(response));
  const over = (async () => {
    try {
      for await (const [, data] of events(response)) {
        const event = JSON.parse(data);
        hear(event);
        if (event.end && request !== "all") return;
      }
    } catch (error) {
      if (!signal.aborted) say(`The rounds stopped: ${error.message}`, true);
    }
  })();
  return { over };
}

const name = () => Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");

function asked() {
  // the form, as a request's fields
  const seed = $("seed").value.trim();
  return { temperature: Number($("temperature").value), max_tokens: Number($("limit").value), seed, plain: $("plain").checked };
}

function body(messages, { seed, plain, ...fields }) {
  const told = JSON.stringify({ messages, stream: true, ...fields, ...(plain ? { eyas: { method: "plain" } } : {}) });
  return seed ? `${told.slice(0, -1)},"seed":${seed}}` : told; // a seed has more digits than a JavaScript number keeps
}

async function ask(messages, settings, prompt) {
  // one answer; returns its turn
  const stopped = new AbortController(),
    watched = new AbortController();
  const turn = newTurn({ request: `page-${name()}`, prompt, messages, settings });
  state.asking = stopped;
  state.follow = true;
  buttons();
  say("Reading the prompt …");
  let watching = null;
  try {
    if (!state.watching) watching = await watch(turn.request, watched.signal).catch((error) => say(`No rounds: ${error.message}`, true));
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json", "X-Request-Id": turn.request }),
      body: body(messages, settings),
      signal: stopped.signal,
    });
    if (!response.ok) throw new Error(await refusal(response));
    for await (const [event, data] of events(response)) {
      if (data === "[DONE]") break;
      const told = JSON.parse(data);
      if (event === "error") throw new Error(told.error.message);
      const [choice] = told.choices;
      if (choice?.delta.content) {
        turn.answer += choice.delta.content;
        if (!turn.rounds.length) turn.text.textContent = turn.answer;
        say("Writing …");
      }
      if (choice?.finish_reason) turn.ended = choice.finish_reason;
      if (told.eyas) turn.seed = /"seed":(-?\d+)/.exec(data)?.[1];
      if (told.timings) turn.timings = told.timings;
    }
    if (watching) await Promise.race([watching.over, new Promise((done) => setTimeout(done, 500))]);
    done(turn);
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else say(error.message, true);
    if (!turn.answer && !turn.rounds.length) {
      turn.view.remove();
      state.turns.splice(state.turns.indexOf(turn), 1);
    }
  }
  watched.abort();
  state.asking = null;
  buttons();
  return turn;
}

function done(turn) {
  const { timings } = turn;
  const parts = [`${some(timings.predicted_n, "token")} in ${some(timings.draft_n_rounds, "round")}`];
  if (timings.predicted_per_second) parts.push(`${timings.predicted_per_second.toFixed(0)} tokens a second`);
  if (turn.seed && turn.settings.temperature > 0) parts.push(`seed ${turn.seed}`);
  const bare = turn.rounds.filter((event) => !reads(event)).length;
  const few = !turn.settings.plain && state.about.method !== "plain" && 2 * bare > turn.rounds.length;
  const why = ` ${bare} of them guessed nothing: a guess costs more here and now than it brings. A server with --tree 8x3x2 grows a tree in each.`;
  say(`${parts.join(", ")}.${few ? why : ""}`);
  $("spoken").textContent = turn.answer;
}

function conversation() {
  // what was said, for the next request
  const past = state.turns.filter((turn) => turn.mine && turn.prompt && turn.answer && !turn.again);
  return past.flatMap((turn) => [
    { role: "user", content: turn.prompt },
    { role: "assistant", content: turn.answer },
  ]);
}

async function send(submitted) {
  submitted.preventDefault();
  const prompt = $("message").value.trim();
  if (!prompt || state.asking) return;
  pause();
  $("message").value = "";
  await ask([...conversation(), { role: "user", content: prompt }], asked(), prompt);
}

async function compare() {
  // the last answer once more, decoded the other way with the same seed
  const first = comparable();
  if (!first || state.asking) return;
  const plain = !first.settings.plain;
  const again = await ask(first.messages, { ...first.settings, seed: first.seed, plain }, `the same ${plain ? "without" : "with"} guesses`);
  again.again = true;
  buttons();
  if (!again.timings) return;
  const same = again.answer === first.answer;
  const [a, b] = [first, again].map(
    (turn) => `${turn.settings.plain ? "without" : "with"} guesses ${turn.timings.predicted_per_second?.toFixed(0) ?? "–"}`,
  );
  say(`${same ? "The same text to the last character" : "The texts differ"}; tokens a second ${a}, ${b}.`, !same);
}

const comparable = () => state.turns.findLast((turn) => turn.mine && turn.ended && turn.timings && !turn.again);

function buttons() {
  const busy = Boolean(state.asking),
    last = comparable();
  $("send").disabled = $("clear").disabled = busy;
  $("stop").disabled = !busy;
  $("compare").disabled = busy || !last;
  $("compare").textContent = `The same ${last?.settings.plain ? "with" : "without"} guesses`;
}

async function everybody() {
  state.watching?.abort();
  state.watching = null;
  if (!$("everybody").checked) return;
  const watching = new AbortController();
  try {
    const { over } = await watch("all", watching.signal);
    state.watching = watching;
    over.then(() => {
      if (state.watching === watching) {
        state.watching = null;
        $("everybody").checked = false;
      }
    });
  } catch (error) {
    $("everybody").checked = false;
    say(error.message, true);
  }
}

// ---- recordings ----

function clear() {
  pause();
  state.turns = [];
  state.all = [];
  state.at = -1;
  state.follow = true;
  $("turns").replaceChildren();
  $("spoken").textContent = "";
  say("");
  buttons();
  empty();
}

function save() {
  const turns = state.turns.map(({ request, choice, prompt, answer, draft, rounds }) => ({ request, choice, prompt, answer, draft, rounds }));
  const file = new Blob([JSON.stringify({ recording: FORM, about: state.about, turns })], { type: "application/json" });
  const link = h("a", { href: URL.createObjectURL(file), download: "rounds.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function load(told) {
  if (told?.recording !== FORM || !Array.isArray(told.turns)) throw new Error("this is no recording of rounds");
  clear();
  introduce(told.about);
  for (const { rounds, ...given } of told.turns) {
    const turn = newTurn({ ...given, request: `recorded-${state.turns.length}`, mine: false, prompt: given.prompt || "another request" });
    turn.text.textContent = given.answer;
    for (const event of rounds) hear({ ...event, request: turn.request, choice: turn.choice });
  }
  soon(() => show(0));
}

function introduce(about) {
  state.about = about ?? {};
  const { model, method, draft, precision } = state.about;
  const parts = [model, draft && `draft ${draft}`, method && `method ${method}`, precision].filter(Boolean);
  if (parts.length) $("about").textContent = parts.join(" · ");
}

async function meet() {
  // the server that the page came from
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) return say(await refusal(response), true);
    const { id, eyas } = (await response.json()).data[0];
    return introduce({ model: id, ...eyas });
  } catch {
    return say("The server does not answer.", true);
  }
}

// ---- hands ----

$("ask").addEventListener("submit", send);
$("message").addEventListener("keydown", (key) => {
  if (key.key === "Enter" && !key.shiftKey && !key.isComposing) {
    key.preventDefault();
    $("ask").requestSubmit();
  }
});
$("stop").addEventListener("click", () => state.asking?.abort());
$("compare").addEventListener("click", compare);
$("clear").addEventListener("click", clear);
$("everybody").addEventListener("change", everybody);
$("key").addEventListener("change", meet);
$("save").addEventListener("click", save);
$("open").addEventListener("change", async ({ target }) => {
  try {
    load(JSON.parse(await target.files[0].text()));
  } catch (error) {
    say(`The file was not opened: ${error.message}`, true);
  }
  target.value = "";
});
$("slider").addEventListener("input", ({ target }) => {
  pause();
  show(Number(target.value));
});
$("before").addEventListener("click", () => {
  pause();
  show(state.at - 1);
});
$("after").addEventListener("click", () => {
  pause();
  show(state.at + 1);
});
$("play").addEventListener("click", play);
document.addEventListener("keydown", (key) => {
  const typing = key.target.closest?.("input, textarea, select, button, label, [tabindex='0']");
  if (typing || key.ctrlKey || key.metaKey || key.altKey || state.at < 0) return;
  if (key.key === "ArrowLeft" || key.key === "ArrowRight") {
    key.preventDefault();
    pause();
    show(state.at + (key.key === "ArrowLeft" ? -1 : 1));
  } else if (key.key === " ") {
    key.preventDefault();
    play();
  }
});

const inside = $("recording");
empty();
if (inside) {
  $("ask").hidden = true;
  load(JSON.parse(inside.textContent));
} else {
  meet();
}
