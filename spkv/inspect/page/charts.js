// Drawings: the heat map, curves and bars.
function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

const shadeOf = share => `color-mix(in oklab, var(--full) ${(100 * share).toFixed(1)}%, var(--paper))`;
const WIDTH = 480, HEIGHT = 200, LEFT = 44, RIGHT = 12, TOP = 8, BOTTOM = 34;

// A frame with axes; x and y map values to places in it.
function frame(label, xMax, xTicks, yTicks, names, yScale = value => value) {
  const chart = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  const x = value => LEFT + value / xMax * (WIDTH - LEFT - RIGHT);
  const y = value => HEIGHT - BOTTOM - yScale(value) * (HEIGHT - BOTTOM - TOP);
  for (const [value, text] of yTicks) {
    chart.append(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 5, y: y(value) + 4, "text-anchor": "end" }, text));
  }
  for (const [value, text] of xTicks) chart.append(svg("text", { x: x(value), y: HEIGHT - BOTTOM + 14, "text-anchor": "middle" }, text));
  chart.append(svg("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 4, "text-anchor": "middle" }, names));
  return { chart, x, y };
}

const shareTicks = [0, .25, .5, .75, 1].map(value => [value, percent(value, 0)]);
const short = tokens => tokens >= 1000 ? `${+(tokens / 1000).toPrecision(3)}k` : String(tokens);

// Two curves, of all heads and of those chosen: points are [x, y].
function curves(place, label, names, xMax, every, chosen) {
  const ticks = [0, .25, .5, .75, 1].map(part => [part * xMax, short(Math.round(part * xMax))]);
  const { chart, x, y } = frame(label, xMax, ticks, shareTicks, names);
  for (const [points, kind] of [[every, "every"], [chosen, "chosen"]]) {
    if (points) chart.append(svg("polyline", { class: kind, points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ") }));
  }
  place.replaceChildren(chart);
}

// Shares of the utilities in equal bins; logarithmic, since sharp gates leave next to nothing in the middle.
function histogram(place, counts, threshold) {
  const total = counts.reduce((sum, value) => sum + value, 0) || 1, least = 1e-4;
  const scale = share => Math.max(0, Math.log10(Math.max(share, least) / least) / Math.log10(1 / least));
  const yTicks = [1, .1, .01, .001].map(value => [value, percent(value, value < .01 ? 1 : 0)]);
  const xTicks = [0, .2, .4, .6, .8, 1].map(value => [value, value.toFixed(1)]);
  const { chart, x, y } = frame("Histogram of utilities", 1, xTicks, yTicks, "utility (share of pairs, logarithmic)", scale);
  counts.forEach((value, bin) => {
    const from = x(bin / counts.length), to = x((bin + 1) / counts.length), top = y(value / total);
    chart.append(svg("rect", { class: "bar", x: from, width: to - from - .5, y: top, height: Math.max(0, HEIGHT - BOTTOM - top) }));
  });
  if (threshold != null) chart.append(svg("line", { class: "threshold", x1: x(threshold), x2: x(threshold), y1: TOP, y2: HEIGHT - BOTTOM }));
  place.replaceChildren(chart);
}

// One Tab stop; arrow keys move, Enter and Space choose.
function heatMap(place, choose) {
  const table = element("table", "", { role: "grid", "aria-labelledby": "heat-title" });
  const header = table.createTHead().insertRow();
  header.append(element("th", "layer", { scope: "col" }));
  for (let head = 0; head < HEADS; head++) header.append(element("th", head, { scope: "col" }));
  const body = table.createTBody(), cells = [];
  data.density_by_head.forEach((densities, layer) => {
    const line = body.insertRow();
    line.append(element("th", data.layers[layer], { scope: "row" }));
    densities.forEach((density, head) => {
      const row = layer * HEADS + head, cell = line.insertCell();
      cell.setAttribute("role", "gridcell");
      cell.setAttribute("aria-label", `${rowName(row)}: ${density === null ? "nothing has left the window" : "density " + density.toFixed(2)}`);
      cell.title = cell.getAttribute("aria-label");
      if (HEADS <= 16 && density !== null) cell.textContent = density.toFixed(2);
      if (density === null) cell.className = "missing"; else cell.style.background = shadeOf(density);
      cell.tabIndex = row ? -1 : 0;
      cell.dataset.row = row;
      cells.push(cell);
    });
  });
  const rowOf = event => event.target.closest("td") && Number(event.target.closest("td").dataset.row);
  table.addEventListener("click", event => { if (rowOf(event) !== null) choose(rowOf(event)); });
  table.addEventListener("keydown", event => {
    const row = rowOf(event);
    if (row === null || event.ctrlKey || event.altKey || event.metaKey) return;
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -HEADS, ArrowDown: HEADS };
    if (event.key === "Enter" || event.key === " ") choose(row);
    else if (Object.hasOwn(steps, event.key)) {
      const next = cells[row + steps[event.key]];
      if (next) { cells.forEach(cell => { cell.tabIndex = -1; }); next.tabIndex = 0; next.focus(); }
    } else return;
    event.preventDefault();
  });
  place.replaceChildren(table);
  return rows => cells.forEach((cell, row) => cell.setAttribute("aria-selected", rows.length < ROWS && rows.includes(row)));
}
