// What all charts of report.html share: colours, ticks, and an empty chart to draw in.
const COLOURS = 10; // --c0 to --c9 in report.css
const colour = (index) => `var(--c${index % COLOURS})`;
const charts = []; // functions that draw a chart anew

const steps = (low, high, most, least = 0) => {
  const rough = Math.max((high - low) / most, least) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-6; n += 1) found.push(n * step);
  return found;
};
const powers = (low, high, most) => {
  const [first, last] = [Math.ceil(Math.log10(low) - 1e-9), Math.floor(Math.log10(high) + 1e-9)];
  const stride = Math.max(1, Math.ceil((last - first + 1) / most));
  const found = [];
  for (let n = first; n <= last; n += stride) found.push(10 ** n);
  return found.length > 1 ? found : [low, high];
};
const tidy = (value) =>
  value >= 1e4 ? value.toLocaleString("en", { notation: "compact" }) : String(Number(value.toPrecision(3)));
const path = (points) => points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
const spreadOf = (std) => (std ? ` ± ${std.toFixed(4)}` : "");

// An empty chart in its holder. The vertical axis spans the given accuracies and a little more. A pointer shows the
// text of the nearest mark, which is {x, y, text}.
const chartIn = (holder, description, accuracies) => {
  const [width, height] = [holder.clientWidth, holder.clientHeight];
  const tip = make("div", { class: "tip", hidden: "" });
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description });
  holder.replaceChildren(svg, tip);
  const box = { left: 44, right: width - 14, top: 12, bottom: height - 28 };
  const label = (x, y, anchor, text) => svg.append(draw("text", { x, y, "text-anchor": anchor }, text));
  const [lowest, highest] = [Math.min(...accuracies), Math.max(...accuracies)];
  const margin = Math.max(0.04 * (highest - lowest), 0.005);
  const [floor, ceiling] = [Math.max(0, lowest - margin), Math.min(1, highest + margin)];
  const up = (y) => {
    const inside = Math.min(Math.max(y, floor), ceiling);
    return box.bottom - ((inside - floor) / (ceiling - floor)) * (box.bottom - box.top);
  };
  const digits = ceiling - floor < 0.05 ? 3 : 2;
  for (const tick of steps(floor, ceiling, 7)) {
    svg.append(draw("line", { class: "grid", x1: box.left, x2: box.right, y1: up(tick), y2: up(tick) }));
    label(box.left - 6, up(tick) + 4, "end", tick.toFixed(digits));
  }
  const upright = (x, text) => {
    svg.append(draw("line", { class: "grid", x1: x, x2: x, y1: box.top, y2: box.bottom }));
    label(Math.min(x, box.right - 8), box.bottom + 18, "middle", text);
  };
  const marks = [];
  const point = (event) => {
    const frame = svg.getBoundingClientRect();
    const distance = ({ x, y }) => Math.hypot(x - event.clientX + frame.left, y - event.clientY + frame.top);
    const nearest = marks.reduce((a, b) => (a && distance(a) <= distance(b) ? a : b), null);
    const found = nearest && distance(nearest) < 40 ? nearest : null;
    for (const mark of marks) mark.line?.classList.remove("near");
    found?.line?.classList.add("near");
    tip.hidden = !found;
    if (!found) return;
    tip.textContent = found.text;
    const [w, h] = [tip.offsetWidth, tip.offsetHeight];
    tip.style.left = `${Math.max(4, Math.min(found.x - w / 2, width - w - 4))}px`;
    tip.style.top = `${found.y - h - 10 > 0 ? found.y - h - 10 : found.y + 14}px`;
  };
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerleave", () => point({ clientX: -1e9, clientY: 0 }));
  return { width, svg, box, label, up, upright, marks };
};
