// The state of the page and its controls. Layer and head are -1 where all of them are shown.
const state = { document: 0, layer: -1, head: -1, shade: "choice", looked: 0 };
const rowsShown = () => everyRow.filter(row => (state.layer < 0 || layerOf(row) === state.layer) && (state.head < 0 || row % HEADS === state.head));
const LATER = 3;

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => element("option", text, { value })));
}
options(byId("document"), documents.map((text, index) => [index, text.name]));
options(byId("layer"), [[-1, "all"], ...data.layers.map((layer, index) => [index, layer])]);
options(byId("head"), [[-1, "all"], ...Array.from({ length: HEADS }, (_, head) => [head, head])]);

function look(token) {
  const text = documents[state.document], rows = rowsShown();
  state.looked = token;
  const later = text.later(rows, token, LATER);
  showToken(text, rows, token, later, position => { view.move(position); byId("text").focus(); });
  view.mark((later ?? []).map(entry => entry.position));
}
let pending = 0;
const view = new TextView(byId("text"), token => {
  state.looked = token;
  pending ||= requestAnimationFrame(() => { pending = 0; look(state.looked); });
});

const markHeat = heatMap(byId("heat"), row => {
  const [layer, head] = [layerOf(row), row % HEADS];
  const again = state.layer === layer && state.head === head;
  Object.assign(state, again ? { layer: -1, head: -1 } : { layer, head });
  showHeads();
});

// Everything that depends on the heads chosen.
function showHeads() {
  const text = documents[state.document], rows = rowsShown();
  for (const name of ["layer", "head", "shade", "document"]) byId(name).value = state[name];
  view.shade(text.shares(rows, state.shade));
  look(state.looked);
  markHeat(rows);
  showCurves(text, rows);
  showUtilities(rows);
  showKinds(rows);
  showWords(rows);
  const who = rows.length === 1 ? rowName(rows[0]) : `${rows.length} heads`;
  byId("scope").textContent = `${who}: density ${percent(average(data.density_by_head, rows))}`;
  const [low, high] = state.shade === "utility" ? ["utility 0", "1"] : rows.length === 1 ? ["dropped", "kept"] : ["kept by no head", "kept by all"];
  byId("legend-low").textContent = low;
  byId("legend-high").textContent = high;
}

async function showDocument(index) {
  Object.assign(state, { document: index, looked: 0 });
  const text = await documents[index].load();
  if (state.document !== index) return; // another one was chosen meanwhile
  view.open(text, text.shares(rowsShown(), state.shade));
  showHeads();
  document.documentElement.dataset.ready = index;
}

for (const name of ["layer", "head"]) {
  byId(name).addEventListener("change", event => { state[name] = Number(event.target.value); showHeads(); });
}
byId("shade").addEventListener("change", event => { state.shade = event.target.value; showHeads(); });
byId("document").addEventListener("change", event => showDocument(Number(event.target.value)));
byId("all").addEventListener("click", () => { Object.assign(state, { layer: -1, head: -1 }); showHeads(); });
byId("controls").addEventListener("submit", event => event.preventDefault());

const deciding = data.threshold == null ? "" : `threshold ${data.threshold}, `;
byId("facts").textContent = `${count(data.tokens)} tokens in ${documents.length} ${documents.length === 1 ? "document" : "documents"}, ${deciding}window ${data.window}: `
  + `density ${percent(data.density)}, kept fraction ${data.kept_fraction.toFixed(2)} (${(1 / data.kept_fraction).toFixed(1)}×).`;
byId("every").replaceChildren(...everyRow.map(row => element("li", `${rowName(row)} ${ofRows(data.words.heads, [row])[0]}.`)));
showMemory();
showDocuments(showDocument);
showDocument(0).catch(error => { byId("facts").textContent = `This browser cannot unpack the data (${error}).`; });
