// Curves over the heads, memory, and measured budgets.

const BANDS = [[0, 6, "all heads"], [1, 5, "middle 80 %"], [2, 4, "middle half"]];

/** Mean and quantiles over the heads of one kind of curve. */
function curvePlot(name, what, format) {
  return (svg, width) => {
    const found = DATA.curves[name];
    if (!found) return `This profile has no ${what} curves.`;
    const shares = DATA.curves.shares, { mean, bands } = found;
    const left = 52, top = 10, height = 270, bottom = height - 36;
    const top_ = name === "mass" ? 1 : Math.max(...bands.at(-1)) || 1;
    const x = linear(0, 1, left, width - 12), y = linear(0, top_, bottom, top);
    verticalAxis(svg, ticks(0, top_, 5), y, left, width - 12, format);
    horizontalAxis(svg, ticks(0, 1, width > 400 ? 5 : 4), x, bottom, width - 12, (value) => percent(value));
    const path = (values) => values.map((value, i) => `${x(shares[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
    BANDS.forEach(([low, high], i) => {
      const back = bands[low].map((value, j) => `${x(shares[j]).toFixed(1)} ${y(value).toFixed(1)}`).reverse().join("L");
      draw(svg, "path", { class: `band b${i}`, d: `M${path(bands[high])}L${back}Z` });
    });
    draw(svg, "path", { class: "line", d: `M${path(mean)}` });
    draw(svg, "line", { class: "here", x1: x(DATA.ratios[state.ratio]), x2: x(DATA.ratios[state.ratio]), y1: top, y2: bottom });
    draw(svg, "text", { class: "name", x: (left + width) / 2, y: height - 2, "text-anchor": "middle" }, "rows kept of a chunk");
    const edge = (i, side) => x(shares[i] + ((shares[i + side] ?? shares[i]) - shares[i]) / 2);
    const marks = shares.map((share, i) => ({
      x: edge(i, -1), y: top, width: edge(i, 1) - edge(i, -1), height: bottom - top,
      lines: [`${percent(share, 1)} of the rows`, `mean ${format(mean[i], true)}, median ${format(bands[3][i], true)}`, `middle half ${format(bands[2][i], true)} to ${format(bands[4][i], true)}`, `heads from ${format(bands[0][i], true)} to ${format(bands[6][i], true)}`],
    }));
    return {
      height, marks,
      label: `Curve of ${what} by the share of rows kept, mean and quantiles over ${LAYERS * HEADS} heads.`,
      legend: [make("span", {}, make("i", { class: "swatch one" }), "mean over heads"), ...BANDS.map(([, , text], i) => make("span", {}, make("i", { class: `swatch b${i}` }), text)), make("span", {}, `dashed: ratio ${ratioNow()}`)],
      table: () => [["rows kept", "mean", ...DATA.curves.quantiles.map((q) => (q === 0 ? "lowest" : q === 1 ? "highest" : percent(q)))],
        ...shares.map((share, i) => [percent(share, 1), ...[mean, ...bands].map((values) => format(values[i], true))])],
    };
  };
}

/** Bytes of a request by its length, full and compressed. */
function memoryPlot(svg, width) {
  const { contexts, full, compressed } = DATA.memory;
  const left = 72, top = 12, height = 300, bottom = height - 36, right = width - 14;
  const x = linear(0, contexts.at(-1), left, right);
  const grid = ticks(0, full.at(-1) / 2 ** 20, 5);
  const y = linear(0, full.at(-1) / 2 ** 20, bottom, top);
  verticalAxis(svg, grid, y, left, right, (value) => whole(value));
  horizontalAxis(svg, (width > 500 ? [0, 16, 32, 48, 64, 80, 96, 112, 128] : [0, 32, 64, 96, 128]).map((k) => k * 1024), x, bottom, right, tokens);
  const path = (values) => values.map((value, i) => `${i ? "L" : "M"}${x(contexts[i]).toFixed(1)} ${y(value / 2 ** 20).toFixed(1)}`).join("");
  compressed.forEach((values, i) => i !== state.ratio && draw(svg, "path", { class: "line other", d: path(values) }));
  draw(svg, "path", { class: "line full", d: path(full) });
  draw(svg, "path", { class: "line", d: path(compressed[state.ratio]) });
  draw(svg, "text", { class: "name", x: (left + width) / 2, y: height - 2, "text-anchor": "middle" }, "tokens of the request, prompt and answer");
  draw(svg, "text", { class: "name", transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "MiB");
  const chosen = compressed[state.ratio];
  const edge = (i, side) => x((contexts[i] + (contexts[i + side] ?? contexts[i])) / 2);
  const marks = contexts.map((context, i) => ({
    x: edge(i, -1), y: top, width: edge(i, 1) - edge(i, -1), height: bottom - top,
    lines: [`${tokens(context)} tokens`, `full KV ${mebibytes(full[i])}`, `at ratio ${ratioNow()} ${mebibytes(chosen[i])}`, `${(full[i] / chosen[i]).toFixed(2)} times less`],
  }));
  return {
    height, marks,
    label: `Memory of a request by its length: at ${tokens(contexts.at(-1))} tokens ${mebibytes(full.at(-1))} full and ${mebibytes(chosen.at(-1))} at ratio ${ratioNow()}.`,
    legend: [make("span", {}, make("i", { class: "swatch full" }), "full KV"), make("span", {}, make("i", { class: "swatch one" }), `ratio ${ratioNow()}`), make("span", {}, "thin: the other ratios")],
    table: () => [["tokens", "full KV", ...DATA.ratios.map((ratio) => `ratio ${ratioName(ratio)}`), "times less"],
      ...contexts.map((context, i) => [whole(context), mebibytes(full[i]), ...compressed.map((values) => mebibytes(values[i])), (full[i] / chosen[i]).toFixed(2)])],
  };
}

/** The measured entry whose ratio is nearest to the chosen one. */
function measuredNow() {
  const distance = (entry) => Math.abs(Math.log(entry.ratio / DATA.ratios[state.ratio]));
  return DATA.measured.reduce((best, entry) => (best && distance(best) <= distance(entry) ? best : entry), null);
}

/** Divergence of all candidates at one ratio. */
function measuredPlot(svg, width) {
  const entry = measuredNow();
  const tried = entry ? entry.candidates.filter((each) => each[1] !== null || each[2] !== null) : [];
  if (!tried.length) return "No log of what was tried.";
  const names = Math.min(230, width * 0.36), left = names + 12, top = 6, step = 24, right = width - 16;
  const bottom = top + tried.length * step, height = bottom + 42;
  const values = tried.flatMap(([, ...both]) => both).filter((value) => value > 0);
  const low = Math.min(...values, 1), high = Math.max(...values, 1e-12), steep = high / low > 15;
  const linearX = steep ? linear(Math.log10(low), Math.log10(high), left + 8, right) : linear(0, high, left, right);
  const x = (value) => (steep ? linearX(Math.log10(Math.max(value, low))) : linearX(value));
  const powers = () => Array.from({ length: 40 }, (_, i) => 10 ** (i - 24)).filter((value) => value >= low && value <= high);
  const grid = steep ? powers() : ticks(0, high, width > 500 ? 5 : 3);
  for (const value of grid) draw(svg, "line", { class: "grid", x1: x(value), x2: x(value), y1: top, y2: bottom });
  horizontalAxis(svg, grid, x, bottom, right, short);
  const characters = Math.floor(names / 6.6);
  const marks = tried.map(([name, chose, checked], place) => {
    const y = top + step * (place + 0.5), best = place === 0 ? " best" : "";
    draw(svg, "text", { class: "name", x: names, y: y + 4, "text-anchor": "end" }, name.length > characters ? `${name.slice(0, characters - 1)}…` : name);
    if (chose !== null) draw(svg, "circle", { class: `ring${best}`, cx: x(chose), cy: y, r: 4.5 });
    if (checked !== null) draw(svg, "circle", { class: `dot${best}`, cx: x(checked), cy: y, r: 5 });
    return { x: 2, y: y - step / 2 + 1, width: right - 2, height: step - 2, lines: [name, `held back: ${checked === null ? "not looked at" : short(checked)}`, `chosen on: ${chose === null ? "spared" : short(chose)}`] };
  });
  draw(svg, "text", { class: "name", x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, `divergence, nats${steep ? " (logarithmic)" : ""}`);
  return {
    height, marks,
    label: `Divergence from full KV of ${tried.length} candidates at ratio ${ratioName(entry.ratio)}; the best is ${tried[0][0]}.`,
    legend: [make("span", {}, make("i", { class: "swatch one" }), "filled: samples held back; ring: samples that chose"), make("span", {}, make("i", { class: "swatch two" }), "best on those held back")],
    table: () => [["candidate", "held back", "chosen on"], ...entry.candidates.map(([name, chose, checked]) => [name, checked ?? "-", chose ?? "-"])],
  };
}
