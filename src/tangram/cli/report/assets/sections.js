// What is chosen, and everything that follows from it.

const NO_SHARES = "This profile has no threshold shares: nothing is known of single samples.";
const LEVEL_WORDS = {
  uniform: "every head the same",
  crosslayer: "thresholds over the whole model, the published rule",
  perlayer: "thresholds over each layer, the published rule",
  mass: "rows go where they hold most attention",
  error: "rows go where they avoid most output error",
  measured: "found by running the engine",
};

const SCOPES = Object.keys(DATA.scopes);
const state = { ...DATA.start, overflow: "often", scope: SCOPES.includes(DATA.start.level) ? DATA.start.level : SCOPES[0] };
const levelData = () => DATA.levels[state.level];
const scopeData = () => DATA.scopes[state.scope];
const ratioNow = () => ratioName(DATA.ratios[state.ratio]);

/** Radio buttons in a row; `choices` are [value, text, explanation]. */
function pills(parent, name, title, choices, change) {
  const box = make("div", { class: "pills" });
  for (const [value, text, explanation] of choices) {
    const input = make("input", { type: "radio", name, value });
    input.addEventListener("change", () => change(value));
    box.append(make("label", explanation ? { title: explanation } : {}, input, make("span", {}, text)));
  }
  parent.append(make("fieldset", {}, make("legend", {}, title), box));
}

function choose(changes) {
  Object.assign(state, changes);
  update();
}

function tile(name, value, ...more) {
  return make("div", { class: "tile" }, make("small", { class: "name" }, name), make("b", {}, value), ...more.map((text) => make("small", {}, text)));
}

function tiles() {
  const rows = levelData().rows[state.ratio];
  const found = [tile("Rows a head keeps", `${Math.min(...rows)} to ${Math.max(...rows)}`, `of ${whole(DATA.chunk)}, ${whole(rows.reduce((a, b) => a + b, 0) / rows.length)} on average`)];
  const scope = scopeData();
  if (scope) {
    const { mean, lowest } = scope.ranks[state.ratio];
    if (mean !== null) found.push(tile("Rank stability", mean.toFixed(2), `lowest sample ${lowest.toFixed(2)}; 1 is the same order`));
    const { often, short: beyond } = scope.overflow[state.level][state.ratio];
    const part = beyond.reduce((a, b) => a + b, 0) / beyond.length / DATA.steps;
    const pairs = often.reduce((a, b) => a + b, 0) / (often.length * scope.samples);
    found.push(tile("Beyond the budgets", percent(part, part < 0.1 ? 1 : 0), "of a sample's own rows", `${percent(pairs)} of heads and samples overflow`, ...(state.level === state.scope ? [] : ["another measure than the budgets': not what is lost"])));
  }
  const at = DATA.memory.contexts.indexOf(32768);
  const full = DATA.memory.full[at], held = DATA.memory.compressed[state.ratio][at];
  found.push(tile("A request of 32K tokens", mebibytes(held), `full KV ${mebibytes(full)}, ${(full / held).toFixed(2)} times as much`));
  found.push(tile("Largest head over the mean", levelData().skew[state.ratio].toFixed(2), "of a layer's rows; decode reads them in equal parts"));
  document.getElementById("tiles").replaceChildren(...found);
}

/** An argument as a shell takes it. */
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`);

function command() {
  const words = ["tangram serve MODEL", `--compression-profile ${quoted(DATA.profile.path)}`, `--compression-scorer ${quoted(DATA.profile.scorer)}`, `--compression-level ${state.level}`, `--compression-ratio ${ratioNow()}`, `--page-group-size ${DATA.page_group_size}`];
  // One span each, so that a line breaks between options only.
  const spans = [...words, ...DATA.serve_flags].flatMap((word) => [make("span", {}, word), " "]);
  document.getElementById("command").replaceChildren(...spans.slice(0, -1));
}

function notes() {
  const ratio = DATA.ratios[state.ratio];
  const known = DATA.known_ratios.includes(ratio) || ratio === 1;
  const listed = DATA.known_ratios.map(ratioName).join(", ");
  document.querySelector(".interpolated").textContent = known || !SCOPES.length ? "" : `The profile knows shares at ratio ${listed}; those at ${ratioNow()} are interpolated.`;
  document.querySelector(".mismatch").textContent = !SCOPES.length || state.level === state.scope ? "" : `Budgets of level ${state.level} do not follow ${state.scope} thresholds: what lies beyond them tells how the two differ, not what is lost.`;
  const section = document.getElementById("measured-section");
  section.hidden = !DATA.measured.length;
  const entry = measuredNow();
  if (!entry) return;
  const figures = [entry.ratio === ratio ? `At ratio ${ratioNow()}` : `Measured nearest to the chosen ratio: ${ratioName(entry.ratio)}`, `begun from ${entry.origin}`];
  if (entry.moved_pages !== null) figures.push(`${whole(entry.moved_pages)} pages moved`);
  if (entry.divergence !== null) figures.push(`divergence ${short(entry.divergence)} nats`);
  if (entry.evaluations !== null) figures.push(`${whole(entry.evaluations)} readings`);
  if (entry.n_samples !== null) figures.push(`${whole(entry.n_samples)} samples`);
  section.querySelector(".note").textContent = `${figures.join(", ")}.`;
}

/** Every row of buttons shows the chosen one, scrolled to where a row is wider than the page. */
function reveal() {
  for (const input of document.querySelectorAll(".pills input")) {
    input.checked = String(state[input.name]) === input.value;
    if (!input.checked) continue;
    const label = input.parentElement, row = label.parentElement;
    row.scrollLeft = label.offsetLeft - row.offsetLeft - (row.clientWidth - label.offsetWidth) / 2;
  }
}

function update() {
  reveal();
  tiles();
  command();
  notes();
  redrawAll();
}

function begin() {
  const controls = document.getElementById("controls");
  pills(controls, "level", "Level", Object.keys(DATA.levels).map((level) => [level, level, LEVEL_WORDS[level]]),
    (level) => choose({ level, scope: SCOPES.includes(level) ? level : state.scope }));
  pills(controls, "ratio", "Ratio", DATA.ratios.map((ratio, i) => [i, ratioName(ratio)]), (ratio) => choose({ ratio }));
  if (SCOPES.length > 1) {
    pills(controls, "scope", "Threshold", [["crosslayer", "crosslayer", "each sample's threshold is over the whole model"], ["perlayer", "perlayer", "each sample's threshold is over each layer"]], (scope) => choose({ scope }));
  }
  controls.addEventListener("submit", (event) => event.preventDefault());
  if (SCOPES.length) {
    const modes = make("div", { class: "modes" });
    document.getElementById("overflow").append(modes);
    pills(modes, "overflow", "Show", [["often", "how often"], ["rows", "by how much"]], (overflow) => choose({ overflow }));
  }
  chart("budgets", budgetMap);
  chart("boxes", boxPlot);
  chart("ranks", rankPlot);
  chart("short", shortPlot);
  chart("overflow", overflowMap);
  chart("mass", curvePlot("mass", "attention mass", (value, exact) => percent(value, exact ? 1 : 0)));
  chart("error", curvePlot("error", "output error", (value) => short(value)));
  chart("memory", memoryPlot);
  if (DATA.measured.length) chart("measured", measuredPlot);
  update();

  document.getElementById("copy").addEventListener("click", async (event) => {
    const button = event.currentTarget;
    const code = document.getElementById("command");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code);
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  darkQuery.addEventListener("change", redrawAll);
  let width = innerWidth, waiting = 0;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(redrawAll, 80);
  });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  addEventListener("beforeprint", () => { printing = true; redrawAll(); });
  addEventListener("afterprint", () => { printing = false; redrawAll(); });
}

begin();
