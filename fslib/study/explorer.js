// The head explorer: maps of layers by heads, one per task; what losing heads costs; what a head attends to.
//
// It runs in JupyterLab (anywidget, with a kernel that computes) and in an HTML file (with `standIn` below in the
// kernel's place, which knows what was recorded and nothing else). All text from data enters as text, never as HTML.

const MARKERS = { o: "●", s: "■", "^": "▲", D: "◆", v: "▼", P: "✚", X: "✖" };

/** Make an element: attributes by name, listeners as onclick and so on, children as nodes or text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const signed = (x, digits = 1) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const between = (low, high, digits = 1) => `[${low.toFixed(digits)}, ${high.toFixed(digits)}]`.replaceAll("-", "−");
const keyOf = (heads) => [...heads].sort((a, b) => a - b).join(" ");
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

class Explorer {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.view = model.get("view");
    this.count = this.view.layers * this.view.heads;
    this.recorded = new Map();
    for (const set of this.view.sets) {
      const key = keyOf(set.heads);
      if (!this.recorded.has(key)) this.recorded.set(key, set);
    }
    this.order = this.view.tasks.map((task) => ranked(task.importance));
    this.total = this.view.tasks.map((task) => task.importance.reduce((a, b) => a + Math.abs(b), 0));
    this.off = new Set(model.get("off"));
    this.shown = 0; // the head whose details are shown
    this.text = { task: 0, number: 0 };
    this.live = new Map(); // scores that this kernel has computed, by head set
    this.patterns = new Map(Object.entries(this.view.patterns));
    this.asked = 0; // number of the last question to the kernel
    this.mark = Math.random().toString(36).slice(2); // of this view: all views of a model hear all answers
    this.awaited = new Set(); // texts that the kernel has been asked for
    this.waiting = null;
    this.build();
    this.listen = (message) => this.hear(message);
    this.follow = () => this.take(model.get("off"));
    this.slide = () => this.setPercent(model.get("percent"), false);
    model.on("msg:custom", this.listen);
    model.on("change:off", this.follow);
    model.on("change:percent", this.slide);
    this.setPercent(model.get("percent"), false);
    this.showHead(this.order[0][0]);
    this.showScores();
  }

  remove() {
    this.model.off("msg:custom", this.listen);
    this.model.off("change:off", this.follow);
    this.model.off("change:percent", this.slide);
    this.root.replaceChildren();
  }

  // What stands where

  build() {
    const { view } = this;
    this.root.classList.add("fslib-explorer");
    this.root.dataset.lmSuppressShortcuts = "true"; // a notebook's own keys would act on its cells
    this.percent = make("input", {
      type: "range", min: 0, max: 100, step: 1, "aria-label": "share of heads in a task's top set, in percent",
      oninput: (event) => this.setPercent(Number(event.target.value), true),
    });
    this.percentSaid = make("output", {});
    this.click = make("select", { "aria-label": "what a click on a head does" },
      make("option", { value: "show" }, "shows it"), make("option", { value: "switch" }, "switches it off or on"));
    this.sets = make("select", { "aria-label": "recorded sets of heads", onchange: () => this.takeRecorded() },
      make("option", { value: "" }, "a recorded set …"));
    view.sets.forEach((set, i) => set.heads.length > 1 && this.sets.append(make("option", { value: i }, set.name)));
    const tops = view.tasks.map((task, t) => make("button", {
      type: "button", class: "top", "data-task": task.name, style: `--c: ${task.color}`, onclick: () => this.take(this.topOf(t)),
    }, `${MARKERS[task.marker] ?? "●"} top of ${task.name}`));
    this.maps = make("div", { class: "maps" }, ...view.tasks.map((task, t) => this.buildMap(task, t)));
    this.details = make("section", { class: "details", "aria-live": "polite" });
    this.scores = make("section", { class: "scores", "aria-live": "polite" });
    this.attention = make("section", { class: "attention" });
    this.root.replaceChildren(
      make("header", {}, make("h2", {}, view.title), make("p", {}, view.about)),
      make("div", { class: "controls" },
        make("label", {}, "Top sets: ", this.percent), this.percentSaid,
        make("label", {}, "A click on a head ", this.click)),
      this.maps,
      make("p", { class: "legend" },
        "Framed: in the task's top set. A task's own mark: special, in no other top set; a number: in so many. ",
        "×: switched off. Arrows move, Space switches a head off or on, Shift and Space its row (or a click on the layer's number), Enter shows what a head attends to."),
      make("div", { class: "controls", role: "group", "aria-label": "switch heads off" },
        "Switch off: ", ...tops,
        make("button", { type: "button", class: "random", onclick: () => this.take(this.matched()) }, "random, as many per layer"),
        make("button", { type: "button", class: "none", onclick: () => this.take([]) }, "none"), this.sets),
      this.scores, this.details, this.attention);
  }

  buildMap(task, t) {
    const { layers, heads } = this.view;
    const largest = Math.max(...task.importance.map(Math.abs)) || 1;
    const grid = make("div", {
      role: "grid", class: "grid", "aria-label": `heads of ${task.name}`, style: `--heads: ${heads}`,
      onmouseover: (event) => this.hover(event), onfocusin: (event) => this.hover(event),
      onclick: (event) => this.clicked(event), onkeydown: (event) => this.pressed(event),
    });
    const cells = new Array(this.count);
    for (let layer = layers - 1; layer >= 0; layer -= 1) {
      const row = make("div", { role: "row", class: "row" }, make("button", {
        type: "button", class: "layer", tabindex: -1, "data-layer": layer, title: `switch layer ${layer + 1} off or on`,
      }, String(layer + 1)));
      for (let head = 0; head < heads; head += 1) {
        const at = layer * heads + head;
        const share = Math.round((100 * Math.abs(task.importance[at])) / largest);
        cells[at] = make("div", {
          role: "gridcell", class: "head", tabindex: at === this.order[t][0] ? 0 : -1, "data-head": at, "data-task": t,
          style: `--share: ${share}%`,
        });
        row.append(cells[at]);
      }
      grid.append(row);
    }
    (this.cells ??= []).push(cells);
    (this.flags ??= []).push(new Array(this.count).fill(-1));
    return make("section", { class: "map", style: `--c: ${task.color}` },
      make("h3", { title: task.description }, make("span", { class: "mark" }, MARKERS[task.marker] ?? "●"), ` ${task.name}`), grid);
  }

  // Sets of heads

  size() {
    return Math.floor((Number(this.percent.value) / 100) * this.count + 1e-9);
  }

  topOf(t) {
    return this.order[t].slice(0, this.size());
  }

  /** As many heads in each layer as are switched off now (or as the first task's top set has), drawn at random. */
  matched() {
    const { layers, heads } = this.view;
    const like = this.off.size ? [...this.off] : this.topOf(0);
    const counts = new Array(layers).fill(0);
    for (const at of like) counts[Math.floor(at / heads)] += 1;
    return counts.flatMap((count, layer) => {
      const row = Array.from({ length: heads }, (_, head) => layer * heads + head);
      for (let i = 0; i < count; i += 1) {
        const j = i + Math.floor(Math.random() * (heads - i));
        [row[i], row[j]] = [row[j], row[i]];
      }
      return row.slice(0, count);
    });
  }

  take(heads) {
    const wanted = new Set(heads);
    if (keyOf(wanted) === keyOf(this.off)) return;
    this.off = wanted;
    this.sets.value = "";
    this.model.set("off", [...wanted].sort((a, b) => a - b));
    this.model.save_changes();
    this.paint();
    this.showScores();
    this.showHead(this.shown);
  }

  takeRecorded() {
    const chosen = this.sets.value;
    if (chosen === "") return;
    this.take(this.view.sets[Number(chosen)].heads);
    this.sets.value = chosen;
  }

  toggle(heads) {
    const every = heads.every((at) => this.off.has(at));
    const wanted = new Set(this.off);
    for (const at of heads) every ? wanted.delete(at) : wanted.add(at);
    this.take(wanted);
  }

  setPercent(percent, ours) {
    this.percent.value = percent;
    const k = this.size();
    this.percentSaid.textContent = `${this.percent.value} %, ${k} of ${this.count} heads`;
    if (ours) {
      this.model.set("percent", Number(this.percent.value));
      this.model.save_changes();
    }
    this.inTop = this.order.map((order) => {
      const inside = new Uint8Array(this.count);
      for (let i = 0; i < k; i += 1) inside[order[i]] = 1;
      return inside;
    });
    this.sharedBy = new Uint8Array(this.count);
    for (const inside of this.inTop) inside.forEach((x, at) => { this.sharedBy[at] += x; });
    this.paint();
    if (this.details.hasChildNodes()) this.showHead(this.shown);
  }

  /** Bring the cells up to date; only those that have changed are touched. */
  paint() {
    this.cells.forEach((cells, t) => {
      const flags = this.flags[t];
      for (let at = 0; at < this.count; at += 1) {
        const inside = this.inTop[t][at];
        const now = inside * (1 + this.sharedBy[at]) * 4 + (this.off.has(at) ? 2 : 0) + (at === this.shown ? 1 : 0);
        if (now === flags[at]) continue;
        flags[at] = now;
        const cell = cells[at];
        cell.className = `head${inside ? " in-top" : ""}${now & 2 ? " off" : ""}${now & 1 ? " shown" : ""}`;
        const mark = MARKERS[this.view.tasks[t].marker] ?? "●";
        if (cell.hasAttribute("aria-label") || cell.tabIndex === 0) this.label(cell, at);
        cell.textContent = now & 2 ? "×" : !inside ? "" : this.sharedBy[at] === 1 ? mark : String(this.sharedBy[at]);
      }
    });
  }

  // What a reader does

  at(event) {
    const cell = event.target.closest?.("[data-head]");
    return cell ? { cell, at: Number(cell.dataset.head), t: Number(cell.dataset.task) } : null;
  }

  hover(event) {
    const found = this.at(event);
    if (found && found.at !== this.shown) this.showHead(found.at);
  }

  clicked(event) {
    const layer = event.target.closest("[data-layer]");
    if (layer) {
      const first = Number(layer.dataset.layer) * this.view.heads;
      this.toggle(Array.from({ length: this.view.heads }, (_, head) => first + head));
      return;
    }
    const found = this.at(event);
    if (!found) return;
    this.focus(found.t, found.at);
    if (this.click.value === "switch" || event.shiftKey || event.ctrlKey || event.metaKey) this.toggle([found.at]);
    else this.pin(found);
  }

  pressed(event) {
    const found = this.at(event);
    if (!found) return;
    const { heads } = this.view;
    const head = found.at % heads;
    const moves = {
      ArrowLeft: head > 0 ? -1 : 0, ArrowRight: head < heads - 1 ? 1 : 0, ArrowUp: heads, ArrowDown: -heads,
      Home: -head, End: heads - 1 - head,
    };
    if (event.key in moves) {
      const next = found.at + moves[event.key];
      if (next >= 0 && next < this.count) this.focus(found.t, next);
    } else if (event.key === " " && event.shiftKey) {
      const first = found.at - head;
      this.toggle(Array.from({ length: heads }, (_, i) => first + i));
    } else if (event.key === " ") this.toggle([found.at]);
    else if (event.key === "Enter") this.pin(found);
    else return;
    event.preventDefault();
    event.stopPropagation();
  }

  focus(t, at) {
    for (const cell of this.cells[t]) if (cell.tabIndex === 0) cell.tabIndex = -1;
    const cell = this.cells[t][at];
    cell.tabIndex = 0;
    this.label(cell, at);
    cell.focus();
  }

  label(cell, at) {
    cell.setAttribute("aria-label", `${this.nameOf(at)}, ${this.standing(at)}${this.off.has(at) ? ", switched off" : ""}`);
  }

  nameOf(at) {
    return `layer ${Math.floor(at / this.view.heads) + 1}, head ${(at % this.view.heads) + 1}`;
  }

  standing(at) {
    const names = this.view.tasks.filter((_, t) => this.inTop[t][at]).map((task) => task.name);
    if (!names.length) return "in no top set";
    return names.length === 1 ? `special: in the top set of ${names[0]} alone` : `shared: in the top sets of ${names.join(", ")}`;
  }

  // What is shown

  showHead(at) {
    this.shown = at;
    this.paint();
    const alone = this.recorded.get(String(at));
    const rows = this.view.tasks.map((task, t) => {
      const importance = task.importance[at];
      return make("tr", { style: `--c: ${task.color}` },
        make("th", { scope: "row" }, make("span", { class: "mark" }, MARKERS[task.marker] ?? "●"), ` ${task.name}`),
        make("td", {}, importance.toPrecision(3)),
        make("td", {}, `${this.order[t].indexOf(at) + 1} of ${this.count}`),
        make("td", {}, `${((100 * Math.abs(importance)) / (this.total[t] || 1)).toFixed(1)} %`),
        make("td", {}, this.inTop[t][at] ? "yes" : "no"),
        make("td", {}, alone ? `${signed(-alone.scores[t].lost)} ${between(-alone.scores[t].lostHigh, -alone.scores[t].lostLow)}` : "not recorded"),
        make("td", {}, alone && task.rise ? signed(task.rise[at], 3) : "not recorded"));
    });
    this.details.replaceChildren(
      make("h3", {}, `${this.nameOf(at)[0].toUpperCase()}${this.nameOf(at).slice(1)}: ${this.standing(at)}`),
      make("table", {},
        make("thead", {}, make("tr", {}, ...["task", "importance", "rank", "share of all heads'", "in top set",
          "change of the score without it alone, points", "rise of the loss without it alone"].map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...rows)));
  }

  /** The scores of the set that is off: recorded, computed in this session, or not known. */
  scoresOf() {
    const key = keyOf(this.off);
    const live = this.live.get(key);
    if (live) return { scores: live, source: "computed now" };
    const set = this.recorded.get(key);
    return set ? { scores: set.scores, source: `recorded: ${set.name}` } : null;
  }

  showScores() {
    const { view } = this;
    const found = this.scoresOf();
    const kernel = this.model.get("kernel");
    const n = this.off.size;
    const rows = view.tasks.map((task, t) => make("tr", { style: `--c: ${task.color}` },
      make("th", { scope: "row" }, make("span", { class: "mark" }, MARKERS[task.marker] ?? "●"), ` ${task.name}`),
      make("td", {}, task.metric),
      make("td", {}, task.whole ? `${task.whole.value.toFixed(1)} ${between(task.whole.low, task.whole.high)}` : "not scored yet"),
      make("td", {}, !n ? "" : found ? `${found.scores[t].value.toFixed(1)} ${between(found.scores[t].low, found.scores[t].high)}` : "–"),
      make("td", {}, !n ? "" : found ? `${signed(-found.scores[t].lost)} ${between(-found.scores[t].lostHigh, -found.scores[t].lostLow)}` : "–")));
    const said = !n ? "No head is switched off."
      : found ? `${n} of ${this.count} heads off; ${found.source}.`
        : kernel ? `${n} of ${this.count} heads off; not scored yet.`
          : `${n} of ${this.count} heads off: this set has no record, and its scores need a kernel (fslib.explore in JupyterLab).`;
    this.progress = make("progress", { hidden: !this.waiting, max: 1, value: 0, "aria-label": "scoring" });
    this.said = make("p", { class: "source" }, said);
    const ask = make("button", {
      type: "button", class: "compute", disabled: Boolean(this.waiting) || !n || Boolean(found), onclick: () => this.ask(),
    }, "Score all tasks without these heads");
    this.scores.replaceChildren(
      make("h3", {}, "Scores"), this.said, ...(kernel ? [ask, this.progress] : []),
      make("table", {},
        make("thead", {}, make("tr", {}, ...["task", "metric", "whole model, %", "without these heads, %", "difference, points"]
          .map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...rows)),
      make("p", { class: "note" }, "In brackets: 95 % intervals over evaluation examples, of this one model."));
  }

  pin({ at, t }) {
    this.pinned = at;
    this.showAttention(t);
  }

  showAttention(t) {
    if (t !== undefined && t !== this.text.task) this.text = { task: t, number: 0 };
    const { task, number } = this.text;
    const { view } = this;
    const pick = make("select", { "aria-label": "task of the text", onchange: (event) => this.showAttention(Number(event.target.value)) },
      ...view.tasks.map((each, i) => make("option", { value: i, selected: i === task }, each.name)));
    const which = make("select", { "aria-label": "text", onchange: (event) => { this.text.number = Number(event.target.value); this.showAttention(); } },
      ...Array.from({ length: view.texts[task] }, (_, i) => make("option", { value: i, selected: i === number }, `text ${i + 1}`)));
    const title = make("h3", {}, `What ${this.nameOf(this.pinned)} attends to`);
    const pattern = this.patterns.get(`${task}/${number}`);
    if (pattern) {
      this.attention.replaceChildren(title, make("p", {}, pick, " ", which, ` answer: ${pattern.label}; the model's: ${pattern.predicted}`),
        this.table(pattern, this.pinned));
    } else if (this.model.get("kernel") && view.texts[task] > 0) {
      this.attention.replaceChildren(title, make("p", {}, pick, " ", which), make("p", { class: "source" }, "Looking at the text …"));
      if (!this.awaited.has(`${task}/${number}`)) this.model.send({ type: "pattern", task, number });
      this.awaited.add(`${task}/${number}`);
    } else {
      this.attention.replaceChildren(title, make("p", {}, pick), make("p", { class: "source" }, this.model.get("kernel") ? "The attention weights of this architecture are not seen." : "No text of this task was recorded: this needs a kernel."));
    }
  }

  /** Tokens by tokens: a row attends to columns; the last column is each token's share of the head's importance. */
  table(pattern, at) {
    const n = pattern.tokens.length;
    const weights = (pattern.decoded ??= bytes(pattern.weights)).subarray(at * n * n, (at + 1) * n * n);
    const importance = pattern.importance[at];
    const largest = weights.reduce((a, b) => Math.max(a, b), 1);
    const whole = importance.reduce((a, b) => a + b, 0) || 1;
    const color = this.view.tasks[this.text.task].color;
    const head = make("tr", {}, make("th", { scope: "col" }, "from ↓ to →"),
      ...pattern.tokens.map((token) => make("th", { scope: "col", class: "token" }, make("span", {}, token))),
      make("th", { scope: "col" }, "importance"));
    const rows = pattern.tokens.map((token, i) => make("tr", {}, make("th", { scope: "row" }, token),
      ...pattern.tokens.map((other, j) => {
        const weight = weights[i * n + j];
        const share = Math.round((100 * weight) / largest);
        return make("td", { class: "weight", style: `--share: ${share}%`, title: `${token} → ${other}: ${((100 * weight) / 255).toFixed(0)} %` });
      }),
      make("td", { class: "importance" }, `${((100 * importance[i]) / whole).toFixed(0)} %`)));
    return make("div", { class: "scroll" },
      make("p", { class: "note" }, `A row's token attends to the columns' (darkest: ${((100 * largest) / 255).toFixed(0)} %). Last column: its share of the head's importance for the task in this text.`),
      make("table", { class: "pattern", style: `--c: ${color}` }, make("thead", {}, head), make("tbody", {}, ...rows)));
  }

  // The kernel

  ask() {
    this.asked += 1;
    this.waiting = { id: `${this.mark}-${this.asked}`, key: keyOf(this.off) };
    this.model.send({ type: "scores", id: this.waiting.id, off: [...this.off] });
    this.showScores();
    this.said.textContent = "Asked the kernel …";
    const { id } = this.waiting;
    setTimeout(() => {
      if (this.waiting?.id === id && !this.waiting.heard) {
        this.said.textContent = "No answer yet: the kernel is at work on another cell, or was restarted (then run the cell again).";
      }
    }, 5000);
  }

  hear(message) {
    if (message.type === "pattern") {
      this.patterns.set(`${message.task}/${message.number}`, message.pattern);
      this.awaited.delete(`${message.task}/${message.number}`);
      if (this.text.task === message.task && this.text.number === message.number) this.showAttention();
    } else if (message.type === "problem" && message.id === undefined) {
      this.awaited.clear();
      const told = make("p", { class: "problem", role: "alert" }, message.text);
      const waits = this.attention.querySelector(".source");
      waits ? waits.replaceWith(told) : this.attention.append(told);
    } else if (this.waiting && message.id === this.waiting.id) {
      this.waiting.heard = true;
      if (message.type === "progress") {
        this.progress.max = message.total;
        this.progress.value = message.done;
        this.said.textContent = message.text;
        return;
      }
      const { key } = this.waiting;
      this.waiting = null;
      if (message.type === "scores") {
        this.live.set(keyOf(message.off), message.scores);
        message.whole.forEach((whole, t) => { this.view.tasks[t].whole = whole; });
      }
      this.showScores();
      if (message.type === "problem") this.said.replaceWith(make("p", { class: "problem", role: "alert" }, message.text));
    }
  }
}

/** Positions of values from the largest down; ties in their order, as `fslib.top_heads` breaks them. */
function ranked(values) {
  return values.map((_, at) => at).sort((a, b) => values[b] - values[a] || a - b);
}

/** What stands in the kernel's place in a file: it holds the state, and answers nothing. */
function standIn(state) {
  return { get: (name) => state[name], set: (name, value) => { state[name] = value; }, save_changes() {}, on() {}, off() {}, send() {} };
}

function render({ model, el }) {
  const explorer = new Explorer(model, el);
  return () => explorer.remove();
}

export default { render, standIn };
