// A matrix of numbers as colours, on a canvas, with one cell under the pointer or the arrow keys.

import { el } from "./dom.js";
import { colour, css, palette } from "./palette.js";
import { theme } from "./theme.js";

const LEFT = 30; // pixels for the names of rows
const BELOW = 16; // and for those of columns
const TALLEST = 30; // pixels of a row, if there are few
const HEIGHT = 300; // of all rows, if there are many

export class HeatMap {
  /** onCell(row, column) for the cell that is looked at, onCell(null) for none. */
  constructor(place, label, readout, onCell) {
    this.canvas = el("canvas", { class: "heat", tabindex: "0", role: "img", "aria-label": label, "aria-describedby": readout });
    this.onCell = onCell;
    this.data = null;
    this.at = null;
    place.append(this.canvas);
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.look(null));
    this.canvas.addEventListener("blur", () => this.look(null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.paint()).observe(place);
  }

  /** data: {rows: names, columns: number, group: columns of one group or 0, values: row by row, low, high} */
  draw(data) {
    this.data = data;
    this.paint();
    if (this.at) this.onCell(...this.at);
  }

  get size() {
    const rows = this.data.rows.length;
    const row = Math.max(3, Math.min(TALLEST, Math.floor(HEIGHT / rows)));
    const width = this.canvas.parentElement.clientWidth;
    return { row, width, height: row * rows + BELOW, column: (width - LEFT) / this.data.columns };
  }

  paint() {
    if (!this.data || !this.canvas.parentElement.clientWidth) return;
    const { row, width, height, column } = this.size;
    const scale = devicePixelRatio;
    const { canvas, data } = this;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.height = `${height}px`;
    }
    const c = canvas.getContext("2d");
    c.setTransform(scale, 0, 0, scale, 0, 0);
    c.clearRect(0, 0, width, height);
    c.imageSmoothingEnabled = false;
    c.drawImage(this.image(), LEFT, 0, width - LEFT, row * data.rows.length);
    this.gaps(c, row, column, width);
    this.names(c, row, column);
    if (this.at) {
      const [r, k] = this.at;
      c.lineWidth = 2;
      c.strokeStyle = getComputedStyle(canvas).getPropertyValue("--mark");
      c.strokeRect(LEFT + k * column - 1, r * row - 1, Math.max(4, column) + 2, row + 2);
    }
  }

  /** One pixel for each cell. */
  image() {
    const { rows, columns, values, low, high } = this.data;
    const colours = palette(theme());
    const pixels = new ImageData(columns, rows.length);
    values.forEach((value, i) => {
      const part = Math.min(1, Math.max(0, (value - low) / (high - low)));
      pixels.data.set(colours[Math.round(part * 255)], 4 * i);
      pixels.data[4 * i + 3] = 255;
    });
    const small = el("canvas", { width: columns, height: rows.length });
    small.getContext("2d").putImageData(pixels, 0, 0);
    return small;
  }

  /** Between cells that are large enough, and between groups of columns. */
  gaps(c, row, column, width) {
    const { rows, columns, group } = this.data;
    const height = row * rows.length;
    c.fillStyle = getComputedStyle(this.canvas).getPropertyValue("--panel");
    if (row > 6) for (let r = 1; r < rows.length; r += 1) c.fillRect(LEFT, r * row - 1, width - LEFT, 1);
    for (let k = 1; k < columns; k += 1) {
      const wide = group && k % group === 0;
      if (wide || column > 6) c.fillRect(LEFT + k * column - (wide ? 1.5 : 0.5), 0, wide ? 3 : 1, height);
    }
  }

  names(c, row, column) {
    const { rows, columns, group } = this.data;
    c.fillStyle = getComputedStyle(this.canvas).getPropertyValue("--dim");
    c.font = `10.5px ${getComputedStyle(this.canvas).fontFamily}`;
    c.textAlign = "right";
    c.textBaseline = "middle";
    const every = Math.ceil(13 / row);
    rows.forEach((name, r) => { if (r % every === 0) c.fillText(name, LEFT - 6, (r + 0.5) * row + 0.5); });
    c.textAlign = "center";
    const step = group && group * column > 16 ? group : 2 ** Math.ceil(Math.log2(24 / column));
    for (let k = 0; k < columns; k += Math.max(1, step)) {
      const name = group && step === group ? `n${k / group}` : String(k);
      const middle = group && step === group ? (group * column) / 2 : column / 2;
      c.fillText(name, LEFT + k * column + middle, row * rows.length + 9);
    }
  }

  look(at) {
    this.at = at;
    this.paint();
    this.onCell(...(at ?? [null]));
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const { row, column } = this.size;
    const k = Math.floor((event.clientX - box.left - LEFT) / column);
    const r = Math.floor((event.clientY - box.top) / row);
    const inside = k >= 0 && k < this.data.columns && r >= 0 && r < this.data.rows.length;
    this.look(inside ? [r, k] : null);
  }

  key(event) {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    if (event.key === "Escape") this.look(null);
    if (!step || !this.data) return;
    event.preventDefault();
    const [r, k] = this.at ? [this.at[0] + step[0], this.at[1] + step[1]] : [0, 0];
    this.look([Math.min(this.data.rows.length - 1, Math.max(0, r)), Math.min(this.data.columns - 1, Math.max(0, k))]);
  }
}

/** A legend: colours from low to high, with names of the ends and of the middle. */
export function drawScale(place, names) {
  const steps = Array.from({ length: 9 }, (_, i) => css(colour(theme(), i / 8)));
  const bar = el("span", { class: "ramp" });
  bar.style.background = `linear-gradient(to right, ${steps.join(", ")})`;
  place.replaceChildren(el("span", { text: names[0] }), bar, el("span", { text: names[1] }));
}
