// The curves of report.html: which lines are shown, in what colour, and which line is picked out.
const groupRows = [...byId("groups").tBodies[0].rows];
const series = data.series.map((one, index) => {
  const row = one.state === "complete" ? groupRows[index] : null;
  const words = `${one.label} ${row ? row.textContent : ""}`.toLowerCase();
  return { ...one, row, words, box: row?.querySelector("input"), swatch: row?.querySelector(".pick i") };
});
const complete = series.filter((one) => one.row);
const methods = [...new Set(complete.map((one) => one.method))];
const showUnfinished = byId("show-unfinished");
byId("unfinished-choice").hidden = complete.length === series.length;
showUnfinished.checked = complete.length === 0;
byId("groups").closest(".scroll").hidden = complete.length === 0;
let shown = [];

// Pointing at a name, or moving the keyboard's focus to it, picks out its lines and dims all others.
const pickOut = (chosen) => {
  for (const svg of document.querySelectorAll(".charts .curves")) svg.classList.toggle("dimmed", chosen.length > 0);
  for (const one of series) for (const line of one.drawn ?? []) line.classList.toggle("chosen", chosen.includes(one));
};
const namePicksOut = (element, ones) => {
  for (const event of ["pointerenter", "focusin"]) element.addEventListener(event, () => pickOut(ones));
  for (const event of ["pointerleave", "focusout"]) element.addEventListener(event, () => pickOut([]));
};
for (const one of complete) namePicksOut(one.row, [one]);

const legendItem = ([name, ones]) => {
  const [item, button, swatch] = [make("li"), make("button", { type: "button" }), make("i")];
  swatch.style.background = ones[0].colour;
  button.append(swatch, name);
  namePicksOut(button, ones);
  item.append(button);
  return item;
};
const update = () => {
  const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (one) => wanted.every((word) => one.words.includes(word));
  shown = series.filter((one) => matches(one) && (one.row || showUnfinished.checked));
  const visible = complete.filter(matches);
  const ticked = visible.filter((one) => one.box.checked);
  const bright = ticked.length ? ticked : visible;
  const each = bright.length <= COLOURS;
  const legend = new Map();
  for (const one of series) {
    one.bright = bright.includes(one);
    one.band = one.bright && each && one.seeds > 1;
    one.colour = one.row ? "var(--faded)" : "var(--soft)";
    if (one.bright) {
      one.colour = colour(each ? bright.indexOf(one) : methods.indexOf(one.method));
      const name = each ? one.label : one.method;
      legend.set(name, [...(legend.get(name) ?? []), one]);
    }
    if (!one.row) continue;
    one.row.hidden = !matches(one);
    one.swatch.style.background = one.colour;
    one.row.classList.toggle("picked", one.box.checked);
  }
  byId("legend").replaceChildren(...[...legend].map(legendItem));
  byId("matches").textContent = `${visible.length} of ${complete.length} groups`;
  byId("clear").hidden = !complete.some((one) => one.box.checked);
  for (const one of series) one.drawn = [];
  charts.forEach((redraw) => redraw());
};

const describe = (one, n) => {
  const hours = one.hours.length ? `, ${tidy(one.hours[n])} simulated hours` : "";
  const spread = one.seeds > 1 ? ` ± ${one.std[n].toFixed(4)}` : "";
  return `${one.label}: ${one.mean[n].toFixed(4)}${spread}, round ${one.round[n]}, ${tidy(one.mib[n])} MiB${hours}`;
};
const drawCurve = (chart, one, key, across) => {
  const points = one[key].map((x, n) => [across(x), chart.up(one.mean[n])]);
  const line =
    points.length > 1
      ? draw("polyline", { class: "curve", points: path(points) })
      : draw("circle", { class: "curve", cx: points[0][0], cy: points[0][1], r: 3 });
  const parts = [line];
  if (one.band) {
    const edge = (sign) => points.map(([x], n) => [x, chart.up(one.mean[n] + sign * one.std[n])]);
    parts.unshift(draw("polygon", { class: "band", points: path([...edge(1), ...edge(-1).reverse()]) }));
    parts[0].style.fill = one.colour;
  }
  line.style.stroke = one.colour;
  line.classList.toggle("bright", one.bright);
  line.classList.toggle("unfinished", !one.row);
  chart.svg.append(...parts);
  one.drawn.push(...parts);
  if (one.row && !one.bright) return;
  chart.marks.push(...points.map(([x, y], n) => ({ x, y, line, text: describe(one, n) })));
};
const addCurves = (holder, key, logarithmic, unit) => {
  charts.push(() => {
    const lines = shown.filter((one) => one[key].length);
    const description = `Accuracy against ${unit}: ${lines.length} lines; the table has the numbers`;
    const chart = chartIn(holder, description, lines.length ? lines.flatMap((one) => one.mean) : [0, 1]);
    chart.svg.classList.add("curves");
    if (!lines.length || chart.width < 80) return;
    const xs = lines.flatMap((one) => [one[key][0], one[key].at(-1)]);
    const scale = logarithmic ? Math.log10 : (value) => value;
    let [low, high] = [Math.min(...xs), Math.max(...xs)];
    if (low === high) [low, high] = logarithmic ? [low / 2, high * 2] : [low - 1, high + 1];
    const { left, right } = chart.box;
    const across = (x) => left + ((scale(x) - scale(low)) / (scale(high) - scale(low))) * (right - left);
    for (const tick of (logarithmic ? powers : steps)(low, high, Math.floor(chart.width / 70), key === "round")) {
      chart.upright(across(tick), tidy(tick));
    }
    for (const one of [...lines].sort((a, b) => a.bright - b.bright)) drawCurve(chart, one, key, across);
  });
};
addCurves(byId("chart-round"), "round", false, "rounds");
addCurves(byId("chart-mib"), "mib", true, "MiB sent");
byId("hours").hidden = !series.some((one) => one.hours.length);
if (!byId("hours").hidden) addCurves(byId("chart-hours"), "hours", false, "simulated hours");

byId("filter").addEventListener("input", update);
showUnfinished.addEventListener("change", update);
byId("clear").addEventListener("click", () => {
  for (const one of complete) one.box.checked = false;
  update();
});
byId("groups").addEventListener("change", update);
byId("groups").addEventListener("click", (event) => {
  const row = event.target.closest("tbody tr");
  if (!row || event.target.closest(".pick") || String(getSelection())) return;
  row.querySelector("input").click();
});
