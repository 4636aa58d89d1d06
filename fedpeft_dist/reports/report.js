// Draws the curves and partitions of report.html, sorts its tables, filters and highlights groups.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = 10; // --c0 to --c9 in report.css
  const byId = (id) => document.getElementById(id);

  const make = (name, attributes = {}, text = "") => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.textContent = text;
    return element;
  };
  const draw = (name, attributes) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };

  // --- tables: a click on a heading sorts by it, a second one turns it round --------------------------------------

  const compare = (a, b, numeric) => {
    if (a === "" || b === "") return (a === "") - (b === ""); // nothing there comes last, whichever way round
    return numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
  };
  const sortBy = (table, heading) => {
    const column = heading.cellIndex;
    const direction = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const keys = new Map(rows.map((row) => [row, row.cells[column]?.dataset.sort ?? ""]));
    const filled = rows.map((row) => keys.get(row)).filter((key) => key !== "");
    const numeric = filled.every((key) => Number.isFinite(Number(key)));
    rows.sort((a, b) => {
      const [x, y] = [keys.get(a), keys.get(b)];
      const order = compare(x, y, numeric);
      const turned = x === "" || y === "" ? order : direction * order;
      return turned || Number(a.dataset.row) - Number(b.dataset.row);
    });
    for (const other of table.tHead.rows[0].cells) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    heading.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
    body.append(...rows);
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const heading of table.tHead.rows[0].cells) {
      heading.querySelector("button")?.addEventListener("click", () => sortBy(table, heading));
    }
  }

  // --- which lines are shown, and in what colour ------------------------------------------------------------------

  const groupRows = [...byId("groups").tBodies[0].rows];
  const series = data.series.map((one, index) => {
    const row = one.state === "complete" ? groupRows[index] : null;
    const words = `${one.label} ${row ? row.textContent : ""}`.toLowerCase();
    return { ...one, row, words, box: row?.querySelector("input"), swatch: row?.querySelector(".pick i") };
  });
  const methods = [...new Set(series.filter((one) => one.row).map((one) => one.method))];
  const showUnfinished = byId("show-unfinished");
  if (series.some((one) => !one.row)) {
    byId("unfinished-choice").hidden = false;
    showUnfinished.checked = groupRows.length === 0;
  }
  byId("groups").closest(".scroll").hidden = groupRows.length === 0;
  let shown = [];
  let hovered = null;

  const colour = (index) => `var(--c${index % COLOURS})`;
  const update = () => {
    const wanted = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (one) => wanted.every((word) => one.words.includes(word));
    shown = series.filter((one) => matches(one) && (one.row || showUnfinished.checked));
    for (const one of series) if (one.row) one.row.hidden = !matches(one);
    const picked = shown.filter((one) => one.box?.checked);
    const bright = picked.length ? picked : shown.filter((one) => one.row);
    const each = bright.length <= COLOURS;
    const legend = new Map();
    for (const one of series) {
      const place = bright.indexOf(one);
      one.bright = place >= 0;
      one.band = one.bright && each && one.seeds > 1;
      one.colour = one.row ? "var(--faded)" : "var(--soft)";
      if (one.bright) one.colour = colour(each ? place : methods.indexOf(one.method));
      if (one.swatch) one.swatch.style.background = one.colour;
      one.row?.classList.toggle("picked", one.box.checked);
      if (one.bright) legend.set(each ? one.label : one.method, one.colour);
    }
    byId("legend").replaceChildren(
      ...[...legend].map(([label, paint]) => {
        const item = make("li");
        const swatch = make("i");
        swatch.style.background = paint;
        item.append(swatch, label);
        return item;
      }),
    );
    const rows = series.filter((one) => one.row);
    const visible = rows.filter((one) => !one.row.hidden).length;
    byId("matches").textContent = `${visible} of ${rows.length} groups`;
    byId("clear").hidden = !series.some((one) => one.box?.checked);
    hovered = null;
    charts.forEach((chart) => chart.draw());
  };

  // --- charts -----------------------------------------------------------------------------------------------------

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

  // An empty picture in its holder: the box inside its margins, and what draws in it.
  const pictureIn = (holder, description) => {
    const [width, height] = [holder.clientWidth, holder.clientHeight];
    const tip = make("div", { class: "tip", hidden: "" });
    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": description });
    holder.replaceChildren(svg, tip);
    const box = { left: 44, right: width - 14, top: 12, bottom: height - 28 };
    const label = (x, y, anchor, text) => {
      const element = draw("text", { x, y, "text-anchor": anchor });
      element.textContent = text;
      svg.append(element);
    };
    const accuracies = (lowest, highest) => {
      let [floor, ceiling] = [Math.max(0, Math.floor(lowest * 20) / 20), Math.min(1, Math.ceil(highest * 20) / 20)];
      if (floor >= ceiling) [floor, ceiling] = [Math.max(0, ceiling - 0.05), Math.max(ceiling, 0.05)];
      const up = (y) => {
        const inside = Math.min(Math.max(y, floor), ceiling);
        return box.bottom - ((inside - floor) / (ceiling - floor)) * (box.bottom - box.top);
      };
      for (const tick of steps(floor, ceiling, 7)) {
        svg.append(draw("line", { class: "grid", x1: box.left, x2: box.right, y1: up(tick), y2: up(tick) }));
        label(box.left - 6, up(tick) + 4, "end", tick.toFixed(2));
      }
      return up;
    };
    const upright = (x, text) => {
      svg.append(draw("line", { class: "grid", x1: x, x2: x, y1: box.top, y2: box.bottom }));
      label(Math.min(x, box.right - 8), box.bottom + 18, "middle", text);
    };
    const tell = (x, y, text) => {
      tip.textContent = text;
      tip.hidden = false;
      const [w, h] = [tip.offsetWidth, tip.offsetHeight];
      tip.style.left = `${Math.max(4, Math.min(x - w / 2, width - w - 4))}px`;
      tip.style.top = `${y - h - 10 > 0 ? y - h - 10 : y + 14}px`;
    };
    return { width, svg, tip, box, label, accuracies, upright, tell };
  };

  const chartOf = (holder, key, logarithmic, unit) => {
    const chart = { points: [] };

    chart.draw = () => {
      const lines = shown.filter((one) => one[key].length);
      const description = `Accuracy against ${unit}: ${lines.length} lines; the table has the numbers`;
      const { width, svg, tip, box, accuracies, upright, tell } = pictureIn(holder, description);
      Object.assign(chart, { points: [], tip, tell });
      if (!lines.length || width < 80) return;
      const xs = lines.flatMap((one) => [one[key][0], one[key].at(-1)]);
      const scale = logarithmic ? Math.log10 : (value) => value;
      let [low, high] = [Math.min(...xs), Math.max(...xs)];
      if (low === high) [low, high] = logarithmic ? [low / 2, high * 2] : [low - 1, high + 1];
      let [floor, ceiling] = [1, 0];
      for (const one of lines) {
        one.mean.forEach((mean, n) => {
          const spread = one.band ? one.std[n] : 0;
          floor = Math.min(floor, mean - spread);
          ceiling = Math.max(ceiling, mean + spread);
        });
      }
      const up = accuracies(floor, ceiling);
      const across = (x) => box.left + ((scale(x) - scale(low)) / (scale(high) - scale(low))) * (box.right - box.left);
      for (const tick of (logarithmic ? powers : steps)(low, high, Math.floor(width / 70), key === "round" ? 1 : 0)) {
        upright(across(tick), tidy(tick));
      }
      const path = (points) => points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");
      for (const one of [...lines].sort((a, b) => a.bright - b.bright)) {
        const points = one[key].map((x, n) => [across(x), up(one.mean[n]), n]);
        if (one.band) {
          const top = points.map(([x, , n]) => [x, up(one.mean[n] + one.std[n])]);
          const below = points.map(([x, , n]) => [x, up(one.mean[n] - one.std[n])]).reverse();
          const style = `fill: ${one.colour}; opacity: 0.15`;
          svg.append(draw("polygon", { points: path([...top, ...below]), style }));
        }
        const line =
          points.length > 1
            ? draw("polyline", { points: path(points), fill: "none", "stroke-linejoin": "round" })
            : draw("circle", { cx: points[0][0], cy: points[0][1], r: 3, fill: "none" });
        line.style.stroke = one.colour;
        line.style.strokeWidth = one.bright ? 1.8 : 1;
        if (!one.row) line.style.strokeDasharray = "4 3";
        svg.append(line);
        chart.points.push({ one, line, points });
      }
      svg.addEventListener("pointermove", (event) => chart.point(event, svg));
      svg.addEventListener("pointerleave", () => chart.unpoint());
    };

    chart.unpoint = () => {
      if (hovered) hovered.style.strokeWidth = hovered.dataset.width;
      hovered = null;
      chart.tip.hidden = true;
    };
    chart.point = (event, svg) => {
      const frame = svg.getBoundingClientRect();
      const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
      let best = { distance: 40 ** 2 };
      for (const { one, line, points } of chart.points) {
        if (!one.bright && one.row) continue;
        for (const [px, py, n] of points) {
          const distance = (px - x) ** 2 + (py - y) ** 2;
          if (distance < best.distance) best = { distance, one, line, n, px, py };
        }
      }
      chart.unpoint();
      if (!best.one) return;
      const { one, n } = best;
      hovered = best.line;
      hovered.dataset.width = hovered.style.strokeWidth;
      hovered.style.strokeWidth = 3.5;
      const spread = one.seeds > 1 ? ` ± ${one.std[n].toFixed(4)}` : "";
      const hours = one.hours.length ? `, ${tidy(one.hours[n])} simulated hours` : "";
      const place = `round ${one.round[n]}, ${tidy(one.mib[n])} MiB${hours}`;
      chart.tell(best.px, best.py, `${one.label}: ${one.mean[n].toFixed(4)}${spread}, ${place}`);
    };
    return chart;
  };
  const charts = [
    chartOf(byId("chart-round"), "round", false, "rounds"),
    chartOf(byId("chart-mib"), "mib", true, "MiB sent"),
  ];
  if (series.some((one) => one.hours.length)) {
    byId("hours").hidden = false;
    charts.push(chartOf(byId("chart-hours"), "hours", false, "simulated hours"));
  }

  // --- accuracy against epsilon ------------------------------------------------------------------------------------

  const DASHES = ["", "7 4", "2 3"]; // by mechanism: epsilons of different mechanisms protect different things
  const dot = (cx, cy, paint, place) => {
    const circle = draw("circle", { cx, cy, r: 3.5 });
    circle.style.stroke = paint;
    circle.style.fill = place ? "var(--panel)" : paint;
    return circle;
  };
  const epsilonChart = (holder, one, mechanisms) => {
    const everything = one.lines.flatMap((line) => [
      ...Object.values(line.guaranteed).flat(),
      ...line.public,
      ...line.unguaranteed,
    ]);
    const epsilons = one.lines.flatMap((line) => Object.values(line.guaranteed).flat()).map(([epsilon]) => epsilon);
    const [low, high] = [Math.min(...epsilons) / 1.3, Math.max(...epsilons) * 1.3];
    const drawn = () => {
      const { width, svg, tip, box, label, accuracies, upright, tell } = pictureIn(
        holder,
        `${one.title}: ${one.lines.length} methods; the table has the numbers`,
      );
      if (width < 160) return;
      // What has no guarantee has no place on the axis: it stands in a field of its own.
      const beside = one.lines.some((line) => line.unguaranteed.length) ? Math.min(110, width / 4) : 0;
      const edge = box.right - beside;
      if (beside) {
        const size = { x: edge, y: box.top, width: beside, height: box.bottom - box.top };
        svg.append(draw("rect", { class: "beside", ...size }));
        label(edge + beside / 2, box.bottom + 18, "middle", "no guarantee");
      }
      const up = accuracies(
        Math.min(...everything.map(([, mean, std]) => mean - std)) - 0.03,
        Math.max(...everything.map(([, mean, std]) => mean + std)),
      );
      const across = (x) => box.left + (Math.log(x / low) / Math.log(high / low)) * (edge - box.left);
      const ticks = new Map(epsilons.map((epsilon) => [tidy(epsilon), epsilon]));
      let taken = -Infinity;
      for (const [text, tick] of [...ticks].sort((a, b) => a[1] - b[1])) {
        if (across(tick) < taken + 30) continue;
        taken = across(tick);
        upright(taken, text);
      }
      const marks = [];
      const mark = (x, [epsilon, mean, std, name], paint, place) => {
        const [y, top, below] = [up(mean), up(mean + std), up(mean - std)];
        const shape =
          epsilon === null ? draw("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8` }) : dot(x, y, paint, place);
        shape.style.stroke = paint;
        shape.style.strokeWidth = 2;
        const bar = draw("line", { x1: x, x2: x, y1: top, y2: below });
        bar.style.stroke = paint;
        svg.append(bar, shape);
        const spread = std ? ` ± ${std.toFixed(4)}` : "";
        const spent = epsilon === null ? "no guarantee" : `epsilon ${tidy(epsilon)}`;
        marks.push({ x, y, text: `${name}: ${mean.toFixed(4)}${spread}, ${spent}` });
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
          const path = points.map(([x, mean]) => `${across(x).toFixed(1)},${up(mean).toFixed(1)}`).join(" ");
          const joined = draw("polyline", { points: path, fill: "none" });
          joined.style.stroke = paint;
          joined.style.strokeWidth = 1.8;
          joined.style.strokeDasharray = DASHES[place % DASHES.length];
          svg.append(joined);
          for (const point of points) mark(across(point[0]), point, paint, place);
        }
        const place = edge + (beside * (number + 1)) / (one.lines.length + 1);
        for (const point of line.unguaranteed) mark(place, point, paint);
      });
      svg.addEventListener("pointermove", (event) => {
        const frame = svg.getBoundingClientRect();
        const distance = ({ x, y }) => (x - event.clientX + frame.left) ** 2 + (y - event.clientY + frame.top) ** 2;
        const nearest = marks.reduce((a, b) => (distance(a) <= distance(b) ? a : b));
        if (distance(nearest) < 30 ** 2) tell(nearest.x, nearest.y, nearest.text);
        else tip.hidden = true;
      });
      svg.addEventListener("pointerleave", () => (tip.hidden = true));
    };
    return { draw: drawn };
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
    charts.push(epsilonChart(holder, one, mechanisms));
  }
  byId("privacy").hidden = !byId("privacy").querySelector("table");

  byId("filter").addEventListener("input", update);
  showUnfinished.addEventListener("change", update);
  byId("clear").addEventListener("click", () => {
    for (const one of series) if (one.box) one.box.checked = false;
    update();
  });
  byId("groups").addEventListener("change", update);
  byId("groups").addEventListener("click", (event) => {
    const row = event.target.closest("tbody tr");
    if (!row || event.target.closest(".pick") || String(getSelection())) return;
    row.querySelector("input").click();
  });
  let width = 0;
  new ResizeObserver(() => {
    if (byId("chart-round").clientWidth === width) return;
    width = byId("chart-round").clientWidth;
    charts.forEach((chart) => chart.draw());
  }).observe(byId("chart-round"));
  update();

  // --- partitions -------------------------------------------------------------------------------------------------

  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const LIGHT_TO_DARK = [[226, 236, 247], [125, 178, 221], [42, 120, 181], [18, 66, 120], [8, 24, 58]];
  const RAMP = dark ? [[28, 58, 96], ...LIGHT_TO_DARK.slice(0, 3).reverse()] : LIGHT_TO_DARK; // few is near the page's
  const shade = (share) => {
    const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
    const index = Math.min(Math.floor(place), RAMP.length - 2);
    return RAMP[index].map((value, n) => Math.round(value + (RAMP[index + 1][n] - value) * (place - index)));
  };
  const picture = (one) => {
    const [clients, classes] = [one.counts.length, one.counts[0].length];
    const most = Math.max(one.most, 1);
    const figure = make("figure");
    const shownClients = clients < one.clients ? `${clients} of ${one.clients.toLocaleString("en")} clients, ` : "";
    figure.append(make("figcaption", {}, `${one.title} (${shownClients}${one.runs} run${one.runs > 1 ? "s" : ""})`));
    const canvas = make("canvas", { width: classes, height: clients, role: "img" });
    canvas.setAttribute("aria-label", `Samples per class of ${clients} clients: ${one.title}; a full shade is ${most}`);
    canvas.style.height = `${Math.max(90, Math.min(240, clients * 6))}px`;
    const context = canvas.getContext("2d");
    const image = context.createImageData(classes, clients);
    one.counts.forEach((row, client) =>
      row.forEach((count, label) => {
        // None at all is left blank; from one sample on the root of the share makes small counts visible.
        if (count) image.data.set([...shade(Math.sqrt(count / most)), 255], (client * classes + label) * 4);
      }),
    );
    context.putImageData(image, 0, 0);
    const scale = make("div", { class: "scale" });
    const ramp = make("span", { class: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${RAMP.map((stop) => `rgb(${stop})`).join(", ")})`;
    const reading = make("span");
    const rest = `1 to ${most} samples; blank: none`;
    reading.textContent = rest;
    scale.append(ramp, reading);
    canvas.addEventListener("pointermove", (event) => {
      const frame = canvas.getBoundingClientRect();
      const client = Math.min(Math.floor(((event.clientY - frame.top) / frame.height) * clients), clients - 1);
      const label = Math.min(Math.floor(((event.clientX - frame.left) / frame.width) * classes), classes - 1);
      const count = one.counts[Math.max(client, 0)][Math.max(label, 0)];
      reading.textContent = `client ${client}, class ${one.names ? one.names[label] : label}: ${count}`;
    });
    canvas.addEventListener("pointerleave", () => (reading.textContent = rest));
    figure.append(canvas, scale);
    return figure;
  };
  const FIRST = 8;
  byId("partitions").hidden = !data.partitions.length;
  byId("comparisons").hidden = !byId("comparisons").querySelector("table");
  byId("pictures").append(...data.partitions.slice(0, FIRST).map(picture));
  if (data.partitions.length > FIRST) {
    const more = byId("more-pictures");
    more.hidden = false;
    more.textContent = `Show ${data.partitions.length - FIRST} more`;
    more.addEventListener("click", () => {
      byId("pictures").append(...data.partitions.slice(FIRST).map(picture));
      more.hidden = true;
    });
  }
})();
