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
/** A value with its 95 % interval; null is what has none, such as an interval over one example. */
function said(value, low, high, write = (x) => x.toFixed(1)) {
  if (value == null) return "not defined";
  const first = write(value).replace("-", "−");
  return low == null ? `${first} [no interval]` : `${first} [${low.toFixed(1)}, ${high.toFixed(1)}]`.replaceAll("-", "−");
}
const saidScore = ({ value, low, high }) => said(value, low, high);
/** What is lost, as a change of the score. */
const saidChange = ({ value, low, high }) => said(...[value, high, low].map((x) => (x == null ? x : -x)), signed);
const markOf = (task) => MARKERS[task.marker] ?? "●";
const nameCell = (task) => make("th", { scope: "row" }, make("span", { class: "mark" }, markOf(task)), ` ${task.name}`);
const headers = (...names) => make("thead", {}, make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name))));
const keyOf = (heads) => [...heads].sort((a, b) => a - b).join(" ");
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

class Explorer {
  constructor(model, root) {
    this.model = model;
    this.root = root;
    this.view = model.get("view");
    [this.layers, this.heads] = this.view.shape;
    this.count = this.layers * this.heads;
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
    this.patterns = new Map(this.view.tasks.flatMap((task, t) => task.patterns.map((text, i) => [`${t}/${i}`, text])));
    this.asked = 0; // number of the last question to the kernel
    this.mark = Math.random().toString(36).slice(2); // of this view: all views of a model hear all answers
    this.awaited = new Set(); // texts that the kernel has been asked for
    this.waiting = null; // the question about scores that has no answer yet
    this.latest = undefined; // the whole model as this kernel has scored it last
    this.build();
    this.listen = (message) => this.hear(message);
    this.follow = () => this.take(model.get("off"), false);
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
    }, `${markOf(task)} top of ${task.name}`));
    this.maps = make("div", { class: "maps" }, ...view.tasks.map((task, t) => this.buildMap(task, t)));
    this.details = make("section", { class: "details" });
    this.buildScores();
    this.buildAttention();
    this.root.replaceChildren(
      make("header", {}, make("h2", {}, view.title), make("p", {}, view.about)),
      make("div", { class: "controls" },
        make("label", {}, "Top sets: ", this.percent), this.percentSaid,
        make("label", {}, "A click on a head ", this.click)),
      this.maps,
      make("p", { class: "legend" },
        "Colour: importance, from none to the task's largest. Framed: in the task's top set. A task's own mark: special, in no other top set; a number: in so many. ",
        "×: switched off. Arrows move, Space switches a head off or on, Shift and Space its row (or a click on the layer's number), Enter shows what a head attends to."),
      make("div", { class: "controls", role: "group", "aria-label": "switch heads off" },
        "Switch off: ", ...tops,
        make("button", { type: "button", class: "random", onclick: () => this.take(this.matched()) }, "random, as many per layer"),
        make("button", { type: "button", class: "none", onclick: () => this.take([]) }, "none"), this.sets),
      this.scores, this.details, this.attention);
  }

  buildMap(task, t) {
    const { layers, heads } = this;
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
      make("h3", { title: task.description }, make("span", { class: "mark" }, markOf(task)), ` ${task.name}`), grid);
  }

  // Sets of heads

  size() {
    return Math.floor((Number(this.percent.value) / 100) * this.count + 1e-9);
  }

  /** All heads of a head's layer. */
  rowOf(at) {
    const first = at - (at % this.heads);
    return Array.from({ length: this.heads }, (_, head) => first + head);
  }

  topOf(t) {
    return this.order[t].slice(0, this.size());
  }

  /** As many heads in each layer as are switched off now (or as the first task's top set has), drawn at random. */
  matched() {
    const { layers, heads } = this;
    const like = this.off.size ? [...this.off] : this.topOf(0);
    const counts = new Array(layers).fill(0);
    for (const at of like) counts[Math.floor(at / heads)] += 1;
    return counts.flatMap((count, layer) => {
      const row = this.rowOf(layer * heads);
      for (let i = 0; i < count; i += 1) {
        const j = i + Math.floor(Math.random() * (heads - i));
        [row[i], row[j]] = [row[j], row[i]];
      }
      return row.slice(0, count);
    });
  }

  /** Switch off these heads and no others. ours: done on this page, and not what the model has told it. */
  take(heads, ours = true) {
    const wanted = new Set(heads);
    if (keyOf(wanted) === keyOf(this.off)) return;
    this.off = wanted;
    this.sets.value = "";
    if (ours) {
      this.model.set("off", [...wanted].sort((a, b) => a - b));
      this.model.save_changes();
    }
    this.paint();
    this.showScores();
    this.showHead(this.shown);
  }

  takeRecorded() {
    const chosen = this.sets.value;
    if (chosen === "") return;
    const { heads } = this.view.sets[Number(chosen)];
    this.live.delete(keyOf(heads)); // what was recorded is asked for
    this.take(heads);
    this.sets.value = chosen;
    this.showScores();
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
        const now = (2 * this.sharedBy[at] + inside) * 4 + (this.off.has(at) ? 2 : 0) + (at === this.shown ? 1 : 0);
        if (now === flags[at]) continue;
        flags[at] = now;
        const cell = cells[at];
        cell.className = `head${inside ? " in-top" : ""}${now & 2 ? " off" : ""}${now & 1 ? " shown" : ""}`;
        if (cell.hasAttribute("aria-label") || cell.tabIndex === 0) this.label(cell, at);
        cell.textContent = now & 2 ? "×" : !inside ? "" : this.sharedBy[at] === 1 ? markOf(this.view.tasks[t]) : String(this.sharedBy[at]);
      }
    });
  }

  // What a reader does

  at(event) {
    const cell = event.target.closest?.("[data-head]");
    return cell ? { at: Number(cell.dataset.head), t: Number(cell.dataset.task) } : null;
  }

  hover(event) {
    const found = this.at(event);
    if (found && found.at !== this.shown) this.showHead(found.at);
  }

  clicked(event) {
    const layer = event.target.closest("[data-layer]");
    if (layer) {
      this.toggle(this.rowOf(Number(layer.dataset.layer) * this.heads));
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
    const { heads } = this;
    const head = found.at % heads;
    const moves = {
      ArrowLeft: head > 0 ? -1 : 0, ArrowRight: head < heads - 1 ? 1 : 0, ArrowUp: heads, ArrowDown: -heads,
      Home: -head, End: heads - 1 - head,
    };
    if (event.key in moves) {
      const next = found.at + moves[event.key];
      if (next >= 0 && next < this.count) this.focus(found.t, next);
    } else if (event.key === " " && event.shiftKey) this.toggle(this.rowOf(found.at));
    else if (event.key === " ") this.toggle([found.at]);
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
    return `layer ${Math.floor(at / this.heads) + 1}, head ${(at % this.heads) + 1}`;
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
      return make("tr", { style: `--c: ${task.color}` }, nameCell(task),
        make("td", {}, importance.toPrecision(3)),
        make("td", {}, `${this.order[t].indexOf(at) + 1} of ${this.count}`),
        make("td", {}, `${((100 * Math.abs(importance)) / (this.total[t] || 1)).toFixed(1)} %`),
        make("td", {}, this.inTop[t][at] ? "yes" : "no"),
        make("td", {}, alone ? saidChange(alone.lost[t]) : "not recorded"),
        make("td", {}, alone && task.rise ? (task.rise[at] == null ? "not defined" : signed(task.rise[at], 3)) : "not recorded"));
    });
    this.details.replaceChildren(
      make("h3", {}, `${this.nameOf(at)[0].toUpperCase()}${this.nameOf(at).slice(1)}: ${this.standing(at)}`),
      make("table", {},
        headers("task", "importance", "rank", "share of all heads'", "in top set", "change of the score without it alone, points",
          "rise of the loss without it alone"),
        make("tbody", {}, ...rows)));
  }

  /** What stays while scores come and go: a button that is rebuilt would lose the keyboard's place. */
  buildScores() {
    this.said = make("p", { class: "source", role: "status" });
    this.ask = make("button", { type: "button", class: "compute", onclick: () => this.score() });
    this.progress = make("progress", { max: 1, value: 0, hidden: true, "aria-label": "scoring" });
    this.work = make("p", { class: "work", role: "status" }); // of the question, which may be about other heads than are off now
    this.scored = make("tbody", {});
    this.scores = make("section", { class: "scores" },
      make("h3", {}, "Scores"), this.said, ...(this.model.get("kernel") ? [this.ask, this.progress, this.work] : []),
      make("table", {},
        headers("task", "metric", "examples", "whole model, %", "without these heads, %", "difference, points"), this.scored),
      make("p", { class: "note" }, "In brackets: 95 % intervals over evaluation examples, of this one model."));
  }

  /** The scores of the set that is off, beside the whole model on the same examples: computed here, recorded, or none. */
  scoresOf() {
    const key = keyOf(this.off);
    const live = this.live.get(key);
    if (live) return live;
    const set = this.recorded.get(key);
    return set && { ...set, whole: this.view.wholes[set.whole], source: `recorded: ${set.name}.` };
  }

  showScores() {
    const found = this.off.size ? this.scoresOf() : undefined;
    const kernel = this.model.get("kernel");
    const off = `${this.off.size} of ${this.count} heads off`;
    const whole = found?.whole ?? this.view.wholes[0] ?? this.latest;
    this.said.textContent = !this.off.size ? "No head is switched off."
      : found ? `${off}; ${found.source}`
        : kernel ? `${off}; not scored yet.`
          : `${off}: this set has no record, and its scores need a kernel (fslib.explore in JupyterLab).`;
    this.ask.textContent = found ? "Score these heads again" : "Score all tasks without these heads";
    this.ask.setAttribute("aria-disabled", Boolean(this.waiting) || !this.off.size);
    this.scored.replaceChildren(...this.view.tasks.map((task, t) => make("tr", { style: `--c: ${task.color}` }, nameCell(task),
      make("td", {}, task.metric),
      make("td", {}, whole ? String(whole[t].examples) : ""),
      make("td", {}, whole ? saidScore(whole[t]) : "not scored yet"),
      make("td", {}, found ? saidScore(found.scores[t]) : this.off.size ? "–" : ""),
      make("td", {}, found ? saidChange(found.lost[t]) : this.off.size ? "–" : ""))));
  }

  pin({ at, t }) {
    this.pinned = at;
    this.showAttention(t);
    const { task, number } = this.text;
    if (this.model.get("kernel") && !this.isRecorded(task, number) && this.view.tasks[task].texts) this.lookAt(task, number); // the model may have changed
  }

  isRecorded(task, number) {
    return number < this.view.tasks[task].patterns.length;
  }

  buildAttention() {
    this.ofTask = make("select", { "aria-label": "task of the text", onchange: () => this.showAttention(Number(this.ofTask.value)) },
      ...this.view.tasks.map((task, t) => make("option", { value: t }, task.name)));
    this.ofText = make("select", { "aria-label": "text", onchange: () => { this.text.number = Number(this.ofText.value); this.showAttention(); } });
    this.headTitle = make("h3", {});
    this.answers = make("span", {});
    this.weights = make("div", {});
    this.attention = make("section", { class: "attention", hidden: true },
      this.headTitle, make("p", {}, this.ofTask, " ", this.ofText, this.answers), this.weights);
  }

  showAttention(t) {
    if (t !== undefined && t !== this.text.task) this.text = { task: t, number: 0 };
    const { task, number } = this.text;
    const there = this.view.tasks[task].texts;
    const pattern = this.patterns.get(`${task}/${number}`);
    this.attention.hidden = false;
    this.headTitle.textContent = `What ${this.nameOf(this.pinned)} attends to`;
    this.ofTask.value = task;
    if (this.ofText.length !== there) this.ofText.replaceChildren(...Array.from({ length: there }, (_, i) => make("option", { value: i }, `text ${i + 1}`)));
    this.ofText.value = number;
    this.ofText.hidden = !there;
    this.answers.textContent = pattern ? ` answer: ${pattern.label}; the model's: ${pattern.predicted}` : "";
    const tell = (text) => this.weights.replaceChildren(make("p", { class: "source", role: "status" }, text));
    if (pattern) this.weights.replaceChildren(this.table(pattern, this.pinned));
    else if (!there) tell("The attention weights of this architecture are not seen.");
    else if (!this.model.get("kernel")) tell("No text of this task was recorded: this needs a kernel.");
    else {
      tell("Looking at the text …");
      this.lookAt(task, number);
    }
  }

  /** Ask the kernel for a text, unless it has been asked. */
  lookAt(task, number) {
    if (this.awaited.has(`${task}/${number}`)) return;
    this.awaited.add(`${task}/${number}`);
    this.model.send({ type: "pattern", task, number });
  }

  /** Tokens by tokens: a row attends to columns; the last column is each token's share of the head's importance. */
  table(pattern, at) {
    const n = pattern.tokens.length;
    const weights = (pattern.decoded ??= bytes(pattern.weights)).subarray(at * n * n, (at + 1) * n * n);
    const importance = pattern.importance.slice(at * n, (at + 1) * n);
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
      make("p", { class: "note" }, `A row's token attends to the columns' (strongest colour: ${((100 * largest) / 255).toFixed(0)} %). Last column: its share of the head's importance for the task in this text.`),
      make("table", { class: "pattern", style: `--c: ${color}` }, make("thead", {}, head), make("tbody", {}, ...rows)));
  }

  // The kernel

  score() {
    if (this.ask.getAttribute("aria-disabled") === "true") return;
    this.asked += 1;
    const id = `${this.mark}-${this.asked}`;
    const heads = [...this.off].sort((a, b) => a - b);
    const named = heads.slice(0, 4).map((at) => `L${Math.floor(at / this.heads) + 1}H${(at % this.heads) + 1}`);
    this.waiting = { id, about: `Without ${named.join(", ")}${heads.length > 4 ? ` and ${heads.length - 4} more` : ""}: ` };
    this.model.send({ type: "scores", id, off: heads });
    this.showScores();
    this.progress.hidden = false;
    this.progress.value = 0;
    this.tell("asked the kernel …");
    setTimeout(() => {
      if (this.waiting?.id === id && !this.waiting.heard) {
        this.tell("no answer yet: the kernel is at work on another cell, or was restarted (then run the cell again).");
      }
    }, 5000);
  }

  /** Say what becomes of the question that is waiting for its answer. */
  tell(text, problem = false) {
    this.work.textContent = this.waiting.about + text;
    this.work.classList.toggle("problem", problem);
  }

  hear(message) {
    if (message.type === "pattern") this.takePattern(message);
    else if (message.type === "problem" && message.id === undefined) this.missText(message);
    else {
      const mine = this.waiting !== null && message.id === this.waiting.id;
      if (message.type === "scores") this.keep(message);
      if (mine) this.takeAnswer(message);
      else if (message.type === "scores") this.showScores(); // another view has asked
    }
  }

  /** What a kernel has scored is known to all views. */
  keep({ off, scores, lost, whole, note }) {
    this.latest = whole;
    const source = `computed at ${new Date().toLocaleTimeString()}. ${note}`;
    this.live.set(keyOf(off), { scores, lost, whole, source });
  }

  takeAnswer(message) {
    this.waiting.heard = true;
    if (message.type === "progress") {
      this.progress.max = message.total;
      this.progress.value = message.done;
      this.tell(message.done ? `${message.done} of ${message.total} tasks scored`
        : "getting the model: without a checkpoint it is trained again, which takes minutes …");
      return;
    }
    this.tell(message.type === "problem" ? message.text : "scored.", message.type === "problem");
    this.waiting = null;
    this.progress.hidden = true;
    this.showScores();
  }

  /** A text has come: which one, of how many there are. */
  takePattern({ task, asked, number, texts, pattern }) {
    if (!this.isRecorded(task, number)) this.patterns.set(`${task}/${number}`, pattern);
    this.awaited.delete(`${task}/${asked}`);
    this.view.tasks[task].texts = texts;
    if (this.text.task !== task || this.pinned === undefined) return;
    this.text.number = Math.min(this.text.number, texts - 1);
    if (this.text.number === number) this.showAttention();
  }

  /** A text cannot be had; what is shown of another stays. */
  missText({ task, number, text }) {
    this.awaited.delete(`${task}/${number}`);
    if (this.text.task !== task || this.text.number !== number || this.pinned === undefined || this.patterns.has(`${task}/${number}`)) return;
    this.weights.replaceChildren(make("p", { class: "problem", role: "alert" }, text));
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
