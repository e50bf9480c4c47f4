// The page's data: a summary, and documents whose arrays are unpacked when they are first shown.
// Legend: row = layer * heads + head; T tokens of a document; K later queries remembered.
const data = JSON.parse(document.getElementById("data").textContent);
const HEADS = data.kv_heads, ROWS = data.layers.length * HEADS;
const byId = id => document.getElementById(id);
const percent = (share, digits = 1) => share == null || Number.isNaN(share) ? "–" : (100 * share).toFixed(digits) + "%";
const count = number => number.toLocaleString("en");
const rowName = row => `layer ${data.layers[Math.floor(row / HEADS)]}, head ${row % HEADS}`;
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

async function unpack(base64) {
  const bytes = Uint8Array.from(atob(base64), char => char.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).arrayBuffer();
}

// Arrays in the file are little-endian, as every machine that runs a browser today is.
class TextDocument {
  constructor(entry) {
    Object.assign(this, entry);
    this.left = Math.max(0, entry.tokens - data.window);
    this.stride = Math.ceil(entry.tokens / 8);
  }

  async load() {
    if (this.keep) return this;
    const { packed } = this;
    const names = ["keep", "utilities", "kinds", "later_positions", "later_weights"];
    const [keep, utilities, kinds, positions, weights] = await Promise.all(
      names.map(name => packed[name] ? unpack(packed[name]) : null));
    this.utilities = new Uint16Array(utilities);
    this.kinds = new Uint8Array(kinds);
    if (positions) {
      this.laterPositions = new Uint32Array(positions);
      this.laterWeights = new Uint16Array(weights);
    }
    this.keep = new Uint8Array(keep);
    this.packed = null;
    return this;
  }

  kept(row, token) {
    return this.keep[row * this.stride + (token >> 3)] >> (token & 7) & 1;
  }

  utility(row, token) {
    return this.utilities[row * this.tokens + token] / data.units;
  }

  // How many of the rows keep each token.
  keptCounts(rows) {
    const counts = new Uint16Array(this.tokens);
    for (const row of rows) {
      for (let byte = 0, token = 0; byte < this.stride; byte++, token += 8) {
        for (let bits = this.keep[row * this.stride + byte], bit = 0; bits; bits >>= 1, bit++) counts[token + bit] += bits & 1;
      }
    }
    return counts;
  }

  // Shares in [0, 1] to shade the tokens by.
  shares(rows, by) {
    const sums = by === "utility" ? new Float64Array(this.tokens) : this.keptCounts(rows);
    if (by === "utility") {
      for (const row of rows) {
        const start = row * this.tokens;
        for (let token = 0; token < this.tokens; token++) sums[token] += this.utilities[start + token];
      }
    }
    const whole = rows.length * (by === "utility" ? data.units : 1);
    return Float32Array.from(sums, sum => sum / whole);
  }

  // The strongest queries past the window that attend to a token, over the rows: [{row, position, weight}].
  later(rows, token, limit) {
    if (!this.laterPositions) return null;
    const found = [], K = this.strongest;
    for (const row of rows) {
      const start = (row * this.tokens + token) * K;
      for (let k = start; k < start + K && this.laterPositions[k]; k++) {
        found.push({ row, position: this.laterPositions[k], weight: this.laterWeights[k] / data.units });
      }
    }
    return found.sort((a, b) => b.weight - a.weight).slice(0, limit);
  }
}

const documents = data.documents.map(entry => new TextDocument({ ...entry, strongest: entry.packed.strongest }));
