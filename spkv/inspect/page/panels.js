// Tables and sentences about the heads that are chosen, and about the token that is looked at.
const layerOf = row => Math.floor(row / HEADS);
const ofRows = (nested, rows) => rows.map(row => nested[layerOf(row)][row % HEADS]);
const everyRow = Array.from({ length: ROWS }, (_, row) => row);

function tableOf(header, lines) {
  const table = element("table");
  const names = table.createTHead().insertRow();
  header.forEach(name => names.append(element("th", name, { scope: "col" })));
  const body = table.createTBody();
  for (const line of lines) {
    const row = body.insertRow();
    line.forEach(value => {
      if (value instanceof Node) row.insertCell().append(value); else row.append(element("td", value));
    });
  }
  return table;
}

function bar(share) {
  const made = element("span", "", { class: "bar" });
  made.style.width = `${6 * share}rem`;
  return made;
}

const average = (nested, rows) => mean(ofRows(nested, rows).map(value => value ?? NaN));

function showCurves(text, rows) {
  const edges = text.position_edges, middles = edges.slice(1);
  const byBin = chosen => middles.map((_, bin) => mean(ofRows(text.density_by_position, chosen).map(bins => bins[bin])));
  const drawn = [rows.length === ROWS ? null : byBin(everyRow), byBin(rows)];
  const steps = values => values && values.flatMap((value, bin) => [[edges[bin], value], [edges[bin + 1], value]]);
  const prefixes = values => {
    let kept = 0;
    return values && values.map((value, bin) => {
      kept += value * (edges[bin + 1] - edges[bin]);
      return [edges[bin + 1] + data.window, kept / edges[bin + 1]];
    });
  };
  if (!middles.length) {
    for (const id of ["position", "length"]) byId(id).replaceChildren(element("p", "Nothing has left the window yet."));
    return;
  }
  const legend = rows.length === ROWS ? "" : "; dashed: all heads";
  curves(byId("position"), "Density over position", "position" + legend, text.tokens, ...drawn.map(steps));
  curves(byId("length"), "Density of the prefixes against their length", "tokens" + legend, text.tokens, ...drawn.map(prefixes));
}

function showUtilities(rows) {
  const counts = ofRows(data.utility_histogram, rows);
  histogram(byId("utility"), counts[0].map((_, bin) => counts.reduce((sum, own) => sum + own[bin], 0)), data.threshold);
  byId("sharpness").textContent = `${percent(average(data.undecided_by_head, rows), 2)} of the utilities lie between 0.1 and 0.9: the fewer, the sharper the gates.`;
  byId("thresholds").replaceChildren(tableOf(
    ["threshold", ...data.density_at_threshold.map(entry => entry.threshold)],
    [["density", ...data.density_at_threshold.map(entry => percent(average(entry.by_head, rows)))]]));
}

function showKinds(rows) {
  const { names, tokens, kept } = data.kinds;
  const density = average(data.density_by_head, rows);
  const own = ofRows(kept, rows), lines = [];
  names.forEach((name, kind) => {
    if (!tokens[kind]) return;
    const rate = mean(own.map(counts => counts[kind])) / tokens[kind];
    lines.push([name, count(tokens[kind]), percent(rate), bar(rate), density ? `${(rate / density).toFixed(1)}×` : "–"]);
  });
  byId("kinds").replaceChildren(tableOf(["kind", "tokens", "kept", "", "against all"], lines));
}

function showWords(rows) {
  const who = rows.length === 1 ? rowName(rows[0]) : "All heads together";
  const said = rows.length === 1 ? ofRows(data.words.heads, rows)[0] : data.words.all;
  byId("words").textContent = `${who[0].toUpperCase()}${who.slice(1)} ${rows.length === 1 ? said : said.replace(/^(keeps|has)/, word => ({ keeps: "keep", has: "have" })[word])}.`;
}

function showMemory() {
  const size = bytes => bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
  byId("memory").replaceChildren(tableOf(["tokens", "dense", "pruned", "kept fraction"], data.memory.map(row => [
    count(row.tokens), size(row.dense_bytes), size(row.pruned_bytes),
    `${row.kept_fraction.toFixed(2)} (${(1 / row.kept_fraction).toFixed(1)}×)`])));
}

function showDocuments(choose) {
  byId("documents").replaceChildren(tableOf(["document", "tokens", "density", ""], documents.map((text, index) => {
    const button = element("button", text.name, { type: "button" });
    button.addEventListener("click", () => choose(index));
    return [button, count(text.tokens), percent(text.density), bar(text.density ?? 0)];
  })));
}

// A token's utilities as a picture, a pixel block a head.
function utilityPicture(text, token) {
  const canvas = element("canvas", "", { role: "img", "aria-label": "utilities by layer (across) and head (down)" });
  const block = Math.max(3, Math.min(10, Math.floor(300 / data.layers.length)));
  [canvas.width, canvas.height] = [data.layers.length * block, HEADS * block];
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  pen.fillStyle = style.getPropertyValue("--full");
  for (const row of everyRow) {
    pen.globalAlpha = text.utility(row, token);
    pen.fillRect(layerOf(row) * block, row % HEADS * block, block, block);
  }
  return canvas;
}

function around(text, position) {
  const from = Math.max(0, position - 6);
  const [before, own, after] = [text.pieces.slice(from, position), text.pieces.slice(position, position + 1), text.pieces.slice(position + 1, position + 4)];
  return `…${before.join("")}⟦${own.join("")}⟧${after.join("")}…`.replace(/\s+/g, " ");
}

function showToken(text, rows, token, later, go) {
  const kept = rows.reduce((sum, row) => sum + text.kept(row, token), 0);
  const utility = mean(rows.map(row => text.utility(row, token)));
  const inside = token >= text.left;
  const parts = [
    element("h2", `Token ${count(token)} of ${count(text.tokens)}`),
    element("code", JSON.stringify(text.pieces[token])),
    element("p", `${data.kinds.names[text.kinds[token]]}${inside ? " · still in the window" : ""}`),
  ];
  if (rows.length === 1) {
    parts.push(element("p", `${rowName(rows[0])}: utility ${utility.toFixed(3)}, ${kept ? "kept" : "dropped"}${inside ? " when it leaves" : ""}`));
  } else {
    parts.push(element("p", `kept by ${kept} of ${rows.length} heads · mean utility ${utility.toFixed(3)}`), utilityPicture(text, token));
  }
  if (later === null) parts.push(element("p", "Later queries were not followed.", { class: "none" }));
  else if (!later.length) parts.push(element("p", inside || kept ? "No later query past the window." : "No query past the window sees it.", { class: "none" }));
  else {
    parts.push(element("p", "Past the window, attended to most from"));
    const list = element("ul");
    for (const { row, position, weight } of later) {
      const item = element("li"), where = rows.length === 1 ? "" : `, ${rowName(row)}`;
      const button = element("button", `${count(position)} (${weight < .001 ? "<0.1%" : percent(weight)}${where}): ${around(text, position)}`, { type: "button" });
      button.addEventListener("click", () => go(position));
      item.append(button);
      list.append(item);
    }
    parts.push(list);
  }
  byId("token").replaceChildren(...parts);
}
