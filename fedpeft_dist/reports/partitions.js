// The partitions of report.html: a picture each, with a pixel for each client (down) and class (across).
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const LIGHT_TO_DARK = [[226, 236, 247], [125, 178, 221], [42, 120, 181], [18, 66, 120], [8, 24, 58]];
// The shade for the fewest samples is near the page's own colour.
const RAMP = dark ? [[28, 58, 96], ...LIGHT_TO_DARK.slice(0, 3).reverse()] : LIGHT_TO_DARK;
const shade = (share) => {
  const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
  const index = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[index].map((value, n) => Math.round(value + (RAMP[index + 1][n] - value) * (place - index)));
};
const picture = (one) => {
  const [clients, classes] = [one.counts.length, one.counts[0].length];
  const most = Math.max(one.most, 1);
  const shownClients = clients < one.clients ? `${clients} of ${one.clients.toLocaleString("en")} clients, ` : "";
  const caption = `${one.title} (${shownClients}${one.runs} run${one.runs > 1 ? "s" : ""})`;
  const description = `Samples per class of ${clients} clients: ${one.title}; a full shade is ${most}`;
  const canvas = make("canvas", { width: classes, height: clients, role: "img", "aria-label": description });
  canvas.style.height = `${Math.max(90, Math.min(240, clients * 6))}px`;
  const context = canvas.getContext("2d");
  const image = context.createImageData(classes, clients);
  one.counts.flat().forEach((count, place) => {
    // A client without samples of a class is left blank; the root of the share makes small counts visible.
    if (count) image.data.set([...shade(Math.sqrt(count / most)), 255], place * 4);
  });
  context.putImageData(image, 0, 0);
  const rest = `1 to ${most} samples; blank: none`;
  const [scale, ramp] = [make("div", { class: "scale" }), make("span", { class: "ramp" })];
  const reading = make("span", {}, rest);
  ramp.style.background = `linear-gradient(to right, ${RAMP.map((stop) => `rgb(${stop})`).join(", ")})`;
  scale.append(ramp, reading);
  canvas.addEventListener("pointermove", (event) => {
    const frame = canvas.getBoundingClientRect();
    const at = (share, size) => Math.max(0, Math.min(Math.floor(share * size), size - 1));
    const client = at((event.clientY - frame.top) / frame.height, clients);
    const label = at((event.clientX - frame.left) / frame.width, classes);
    const name = one.names ? one.names[label] : label;
    reading.textContent = `client ${client}, class ${name}: ${one.counts[client][label]}`;
  });
  canvas.addEventListener("pointerleave", () => (reading.textContent = rest));
  const figure = make("figure");
  figure.append(make("figcaption", {}, caption), canvas, scale);
  return figure;
};
const FIRST = 8;
byId("partitions").hidden = !data.partitions.length;
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
