// The text: only the rows in sight exist as elements, so that a long text costs no more than a short one.
// Characters without a picture of their own, or that would reorder their neighbours, are shown by their code.
const code = char => "\\u" + char.codePointAt(0).toString(16).padStart(4, "0");
function visible(piece) {
  if (piece === "") return "∅";
  return piece.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]|\p{Cs}/gu, code).replace(/\t/g, "⇥   ").replace(/\n/g, "↵\n");
}

const SHADES = 16, MARGIN = 8;

class TextView {
  constructor(root, look) {
    Object.assign(this, { root, look, rows: [], text: null, shares: null, current: 0, marked: new Set() });
    this.sizer = root.appendChild(element("div", "", { "aria-hidden": "true" }));
    this.drawn = root.appendChild(element("div", "", { role: "presentation" }));
    this.rowHeight = parseFloat(getComputedStyle(root).lineHeight);
    for (let shade = 0; shade < SHADES; shade++) {
      document.styleSheets[0].insertRule(`.s${shade} { background: ${shadeOf(shade / (SHADES - 1))}; }`);
      byId("ramp").append(element("span", "", { class: "s" + shade }));
    }
    root.addEventListener("scroll", () => this.soon());
    root.addEventListener("mouseover", event => look(this.tokenOf(event) ?? this.current));
    root.addEventListener("mouseleave", () => look(this.current));
    root.addEventListener("click", event => { if (this.tokenOf(event) !== null) this.move(this.tokenOf(event)); });
    root.addEventListener("keydown", event => this.press(event));
    new ResizeObserver(() => { if (this.text && root.clientWidth !== this.width) { this.layOut(); this.reveal(this.current); this.draw(); } }).observe(root);
  }

  tokenOf(event) {
    const token = event.target.dataset.token;
    return token === undefined ? null : Number(token);
  }

  open(text, shares) {
    Object.assign(this, { text, shares, current: 0 });
    this.root.scrollTop = 0;
    this.layOut();
    this.draw();
  }

  shade(shares) {
    this.shares = shares;
    this.draw();
  }

  // Rows of parts [token, shown]. A token is split at its line breaks; a row is broken before its last word.
  layOut() {
    const style = getComputedStyle(this.root), pen = document.createElement("canvas").getContext("2d");
    pen.font = `${style.fontSize} ${style.fontFamily}`;
    const widths = new Map(), { pieces } = this.text;
    const widthOf = shown => {
      if (!widths.has(shown)) widths.set(shown, pen.measureText(shown).width);
      return widths.get(shown);
    };
    this.width = this.root.clientWidth;
    const room = this.width - 2 * MARGIN;
    this.rows = [];
    this.rowOf = new Uint32Array(pieces.length);
    let row = [], used = 0, word = 0;
    const close = rest => {
      this.rows.push(row);
      row = rest;
      used = rest.reduce((sum, [, shown]) => sum + widthOf(shown), 0);
      word = 0;
    };
    pieces.forEach((piece, token) => {
      visible(piece).split("\n").forEach((shown, index) => {
        if (index) close([]);
        if (!shown) return;
        if (/^\s/.test(shown)) word = row.length;
        if (used + widthOf(shown) > room && row.length) close(word && word < row.length ? row.splice(word) : []);
        row.push([token, shown]);
        used += widthOf(shown);
      });
    });
    close([]);
    for (let index = this.rows.length - 1; index >= 0; index--) for (const [token] of this.rows[index]) this.rowOf[token] = index;
    this.sizer.style.height = `${this.rows.length * this.rowHeight}px`;
  }

  soon() {
    this.waiting ||= requestAnimationFrame(() => { this.waiting = 0; this.draw(); });
  }

  draw() {
    const first = Math.max(0, Math.floor(this.root.scrollTop / this.rowHeight) - 4);
    const last = Math.min(this.rows.length, Math.ceil((this.root.scrollTop + this.root.clientHeight) / this.rowHeight) + 4);
    const fragment = document.createDocumentFragment(), known = new Set();
    for (let index = first; index < last; index++) {
      const line = fragment.appendChild(element("div", "", { class: "row", role: "presentation" }));
      line.style.top = `${index * this.rowHeight}px`;
      for (const [token, shown] of this.rows[index]) {
        const part = line.appendChild(element("span", shown, { role: "option", class: this.classOf(token), "data-token": token }));
        part.setAttribute("aria-selected", token === this.current);
        part.setAttribute("aria-posinset", token + 1);
        part.setAttribute("aria-setsize", this.text.tokens);
        if (!known.has(token)) part.id = `t${token}`;
        known.add(token);
      }
    }
    this.drawn.replaceChildren(fragment);
    if (known.has(this.current)) this.root.setAttribute("aria-activedescendant", `t${this.current}`);
    else this.root.removeAttribute("aria-activedescendant");
  }

  classOf(token) {
    const names = ["s" + Math.round(this.shares[token] * (SHADES - 1))];
    if (token >= this.text.left) names.push("inside");
    if (token === this.current) names.push("current");
    if (this.marked.has(token)) names.push("later");
    return names.join(" ");
  }

  // Underline the tokens that attend to the one looked at.
  mark(tokens) {
    this.marked = new Set(tokens);
    for (const part of this.drawn.querySelectorAll("span")) part.classList.toggle("later", this.marked.has(Number(part.dataset.token)));
  }

  reveal(token) {
    const top = this.rowOf[token] * this.rowHeight, { scrollTop, clientHeight } = this.root;
    if (top < scrollTop + this.rowHeight) this.root.scrollTop = top - this.rowHeight;
    else if (top > scrollTop + clientHeight - 2 * this.rowHeight) this.root.scrollTop = top - clientHeight + 2 * this.rowHeight;
  }

  move(token) {
    if (token < 0 || token >= this.text.tokens) return;
    this.current = token;
    this.reveal(token);
    this.draw();
    this.look(token);
  }

  press(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const page = Math.floor(this.root.clientHeight / this.rowHeight) - 2;
    const moves = {
      ArrowLeft: () => this.current - 1, ArrowRight: () => this.current + 1,
      ArrowUp: () => this.inRow(-1), ArrowDown: () => this.inRow(1),
      PageUp: () => this.inRow(-page), PageDown: () => this.inRow(page),
      Home: () => 0, End: () => this.text.tokens - 1,
      n: () => this.nextKept(1), p: () => this.nextKept(-1),
    };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    this.move(moves[event.key]());
  }

  // The token in another row that stands where the current one stands in its own.
  inRow(step) {
    const now = this.rowOf[this.current], place = this.rows[now].findIndex(([token]) => token === this.current);
    let index = Math.min(this.rows.length - 1, Math.max(0, now + step));
    while (!this.rows[index].length && index > 0 && index < this.rows.length - 1) index += Math.sign(step);
    const row = this.rows[index];
    return row.length ? row[Math.min(place, row.length - 1)][0] : this.current;
  }

  nextKept(step) {
    let token = this.current + step;
    while (token >= 0 && token < this.text.tokens && this.shares[token] < .5) token += step;
    return token;
  }
}
