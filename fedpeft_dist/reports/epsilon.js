// The charts of accuracy against epsilon, and the first drawing of all charts.
const DASHES = ["", "7 4", "2 3"]; // a look for each mechanism, because different mechanisms protect different things
const dot = (cx, cy, paint, place) => {
  const circle = draw("circle", { cx, cy, r: 3.5 });
  circle.style.stroke = paint;
  circle.style.fill = place ? "var(--panel)" : paint;
  return circle;
};
const addEpsilons = (holder, one, mechanisms) => {
  const guaranteed = one.lines.flatMap((line) => Object.values(line.guaranteed).flat());
  const everything = [...guaranteed, ...one.lines.flatMap((line) => [...line.public, ...line.unguaranteed])];
  const epsilons = guaranteed.map(([epsilon]) => epsilon);
  const [low, high] = [Math.min(...epsilons) / 1.3, Math.max(...epsilons) * 1.3];
  charts.push(() => {
    const chart = chartIn(
      holder,
      `${one.title}: ${one.lines.length} methods; the table has the numbers`,
      everything.flatMap(([, mean, std]) => [mean - std, mean + std]),
    );
    const { width, svg, box, up, marks } = chart;
    if (width < 160) return;
    // Groups without a guarantee have no epsilon, so they stand in a field beside the axis.
    const beside = one.lines.some((line) => line.unguaranteed.length) ? Math.min(110, width / 4) : 0;
    const edge = box.right - beside;
    if (beside) {
      const size = { x: edge, y: box.top, width: beside, height: box.bottom - box.top };
      svg.append(draw("rect", { class: "beside", ...size }));
      chart.label(edge + beside / 2, box.bottom + 18, "middle", "no guarantee");
    }
    const across = (x) => box.left + (Math.log(x / low) / Math.log(high / low)) * (edge - box.left);
    let taken = -Infinity;
    for (const epsilon of [...epsilons].sort((a, b) => a - b)) {
      if (across(epsilon) < taken + 30) continue;
      taken = across(epsilon);
      chart.upright(taken, tidy(epsilon));
    }
    const mark = (x, [epsilon, mean, std, name], paint, place) => {
      const y = up(mean);
      const shape =
        epsilon === null ? draw("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8` }) : dot(x, y, paint, place);
      const bar = draw("line", { x1: x, x2: x, y1: up(mean + std), y2: up(mean - std) });
      shape.style.strokeWidth = 2;
      for (const part of [bar, shape]) part.style.stroke = paint;
      svg.append(bar, shape);
      const spent = epsilon === null ? "no guarantee" : `epsilon ${tidy(epsilon)}`;
      marks.push({ x, y, text: `${name}: ${mean.toFixed(4)}${spreadOf(std)}, ${spent}` });
    };
    one.lines.forEach((line, number) => {
      const paint = colour(number);
      for (const [, mean, , name] of line.public) {
        const dotted = draw("line", { class: "public", x1: box.left, x2: edge, y1: up(mean), y2: up(mean) });
        dotted.style.stroke = paint;
        svg.append(dotted);
        marks.push({ x: edge, y: up(mean), text: `${name}: ${mean.toFixed(4)}` });
      }
      for (const [mechanism, points] of Object.entries(line.guaranteed)) {
        const place = mechanisms.indexOf(mechanism);
        const places = points.map(([x, y]) => [across(x), up(y)]);
        const joined = draw("polyline", { class: "curve bright", points: path(places) });
        joined.style.stroke = paint;
        joined.style.strokeDasharray = DASHES[place % DASHES.length];
        svg.append(joined);
        for (const point of points) mark(across(point[0]), point, paint, place);
      }
      const place = edge + (beside * (number + 1)) / (one.lines.length + 1);
      for (const point of line.unguaranteed) mark(place, point, paint);
    });
  });
};
const keyOf = (paint, dash, text, ...marks) => {
  const item = make("li");
  const swatch = draw("svg", { width: 24, height: 10, "aria-hidden": "true" });
  const stroke = draw("line", { x1: 0, x2: 24, y1: 5, y2: 5, "stroke-dasharray": dash });
  stroke.style.stroke = paint;
  stroke.style.strokeWidth = 2.5;
  swatch.append(stroke, ...marks);
  item.append(swatch, text);
  return item;
};
for (const one of data.epsilon) {
  const mechanisms = [...new Set(one.lines.flatMap((line) => Object.keys(line.guaranteed)))].sort();
  const [figure, holder, legend] = [make("figure"), make("div", { class: "chart" }), make("ul", { class: "keys" })];
  legend.append(
    ...one.lines.map((line, number) => keyOf(colour(number), "", line.label)),
    ...mechanisms.map((name, place) => {
      return keyOf("var(--soft)", DASHES[place % DASHES.length], name, dot(12, 5, "var(--soft)", place));
    }),
    keyOf("var(--soft)", "1 4", "no privacy"),
  );
  figure.append(make("figcaption", {}, one.title), holder, legend);
  byId("epsilon").append(figure);
  addEpsilons(holder, one, mechanisms);
}

let width = 0;
new ResizeObserver(() => {
  if (byId("chart-round").clientWidth === width) return;
  width = byId("chart-round").clientWidth;
  update();
}).observe(byId("chart-round"));
update();
